"""Engines in the test's process, and random requests. Their answers in transformers: `answers`."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import plphp
import plphp.vllm
from plphp.demo.model import WEIGHTS

LAYERS: int = json.loads((WEIGHTS / "config.json").read_text())["text_config"]["num_hidden_layers"]
BLOCK = 32  # the least that vLLM's CPU attention takes
QUESTIONS = ("describe picture 1.", "describe all pictures.", "what is red in picture 1?", "hello")
WORDS = ("", "", "and", "this one?", "the next picture is red.")  # text between images


@dataclass(frozen=True)
class Request:
    """One request.

    policy: how the prompt is pruned, None for an unpruned request
    tokens: number of tokens to generate
    words: the text after each image, empty after images beyond its length
    videos: (frames, height, width, 3) uint8 each
    order: "image" or "video" for each of them, as they stand in the prompt; empty: videos are last
    """

    images: tuple[Image.Image, ...]
    question: str
    policy: Any
    tokens: int
    words: tuple[str, ...] = ()
    videos: tuple[np.ndarray, ...] = ()
    order: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What stands in the prompt, "image" or "video", in this order."""
        return self.order or ("image",) * len(self.images) + ("video",) * len(self.videos)

    @property
    def chat(self) -> list[dict[str, Any]]:
        return self.talk([{"type": "image_pil", "image_pil": image} for image in self.images])

    def talk(self, media: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The chat; `media` are its parts for images and videos."""
        content = []
        for item, words in zip_longest(media, self.words, fillvalue=""):
            content += [item, {"type": "text", "text": words}] if words else [item]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.question}]}]

    def text(self, tokenizer: Any) -> str:
        """The chat as text, with a placeholder for each image and video."""
        talk = self.talk([{"type": kind} for kind in self.kinds])
        text: str = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        return text

    @property
    def sampling(self) -> SamplingParams:
        extra: dict[str, Any] = {"plphp": "off"}
        if self.policy is not None:
            options = asdict(self.policy)
            fixed = ("round_to", "window")  # a request cannot change them
            extra = {f"plphp.{name}": options[name] for name in options if name not in fixed}
        return SamplingParams(
            temperature=0, max_tokens=self.tokens, min_tokens=self.tokens, extra_args=extra
        )


def picture(seed: int, most: int = 10, least: int = 2) -> Image.Image:
    """An image of `least` to `most` vision tokens a side, each a square of one color, 28 px."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(least, most, 2, endpoint=True)
    small = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((int(width) * 28, int(height) * 28), Image.NEAREST)


def film(rng: random.Random, frames: int) -> np.ndarray:
    """A video with frames of 56 x 84 pixels."""
    pictures = [picture(rng.randrange(10**6), most=4) for _ in range(frames)]
    return np.stack([np.asarray(picture.resize((84, 56))) for picture in pictures])


def random_requests(count: int, seed: int, most: int = 10) -> list[Request]:
    """Requests with 0 to 6 images; the thresholds put layers into all three layer classes."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        number = rng.choice((0, 1, 1, 2, 3, 4, 5, 6))
        images = tuple(picture(rng.randrange(10**6), most) for _ in range(number))
        words = tuple(rng.choice(WORDS) for _ in images)
        r = rng.choice((0.2, 0.4, 0.5))
        beta = rng.uniform(0.2, 0.6)
        policy = plphp.PLPHP(
            r=r,
            delta_r=min(r, 0.3),
            beta=beta,
            alpha=beta + rng.uniform(0, 0.2),
            budget=rng.choice(("image", "image", "image", "global")),
            gqa=rng.choice(("mean", "mean", "max")),
            min_tokens=rng.choice((0, 0, 3)),
        )
        pruned = policy if rng.random() < 0.85 else None
        out.append(Request(images, rng.choice(QUESTIONS), pruned, rng.randint(4, 24), words))
    return out


def related_requests(count: int, seed: int) -> list[Request]:
    """Long answers to up to four images. About half of the requests share a prefix with another.

    They have the same images and another policy or question, another first image under the same
    text, or one image more. In some of them a video stands before the images.
    """
    rng, out = random.Random(seed), []
    for made in random_requests(count, seed, most=8):
        four = {"images": made.images[:4], "words": made.words[:4]}
        request = replace(made, **four, tokens=made.tokens + 12)
        before = out[-1] if out and out[-1].images else request
        changed = rng.choice(("images", "same text", "one more", "video first", "", "", ""))
        if changed == "images":
            request = replace(request, images=before.images, words=before.words)
        elif changed == "same text" and before.images:
            again = (picture(rng.randrange(10**6), 8), *before.images[1:])
            request = replace(before, images=again, policy=request.policy)
        elif changed == "one more" and len(before.images) < 4:
            more = (*before.images, picture(rng.randrange(10**6), 8))
            order = (*before.order, "image") if before.order else ()
            request = replace(before, images=more, order=order, policy=request.policy)
        elif changed == "video first":
            order = ("video", *["image"] * len(request.images))
            request = replace(request, videos=(film(rng, 4),), order=order)
        out.append(request)
    return out


@contextlib.contextmanager
def engine(policy: Any = None, **options: Any) -> Iterator[LLM]:
    """A vLLM engine of the embedded model; `stock=True` for one without pruning."""
    close_shared()  # a process has one engine at a time
    own = {
        name: options.pop(name)
        for name in ("layers_per_group", "share_prefix", "on", "full_graphs")
        if name in options
    }
    if not options.pop("stock", False):
        options |= plphp.vllm.engine_args(policy, **own)
    defaults: dict[str, Any] = {
        "model": str(WEIGHTS),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 6, "video": 0},
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": BLOCK,
        "seed": 0,
        "mm_processor_cache_gb": 0,
    }
    with contextlib.ExitStack() as stack:
        stack.callback(cleanup_dist_env_and_memory)
        llm = LLM(**defaults | options)
        stack.callback(llm.llm_engine.engine_core.shutdown)
        yield llm


SHARED: list[tuple[LLM, contextlib.ExitStack]] = []


@contextlib.contextmanager
def shared() -> Iterator[LLM]:
    """The engine of `engine()`, with empty caches. Tests that follow each other share it.

    A start and an end take four seconds. What a test assigns to the engine's objects is undone.
    """
    if not SHARED:
        with contextlib.ExitStack() as stack:
            made = stack.enter_context(engine())
            SHARED.append((made, stack.pop_all()))
    llm = SHARED[0][0]
    objects = [
        llm.llm_engine,
        llm.llm_engine.input_processor,
        scheduler_of(llm),
        scheduler_of(llm).connector,
        scheduler_of(llm).connector.scheduler,
    ]
    before = [set(vars(one)) for one in objects]
    try:
        yield llm
    except BaseException:
        close_shared()
        raise
    for one, names in zip(objects, before, strict=True):
        for name in vars(one).keys() - names:
            delattr(one, name)
    llm.llm_engine.step()  # the workers hear of the last end
    assert not llm.llm_engine.has_unfinished_requests() and state(llm) == 0
    assert llm.llm_engine.reset_prefix_cache(), "blocks are in use"
    llm.llm_engine.reset_encoder_cache()
    scheduler_of(llm).connector.scheduler.counts.take()


def close_shared() -> None:
    """Shut down the shared engine, if there is one."""
    while SHARED:
        SHARED.pop()[1].close()


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: LLM) -> int:
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def state(llm: LLM) -> int:
    """The number of entries that the plugin holds for requests, in the scheduler and the worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    scheduler, worker = scheduler_of(llm).connector.scheduler, get_kv_transfer_group().worker
    managers = [held for m in scheduler.managers for held in (m.pruned, m.reserved)]
    planned = [
        scheduler.prompts,
        scheduler.awaited,
        scheduler.blocks,
        scheduler.refused,
        scheduler.features,
    ]
    kept = [worker.pruned_requests, worker.endings, worker.choices, worker.batch_tables.rows]
    kept += [worker.queries, worker.parts]
    return sum(len(entries) for entries in managers + planned + kept)


def generate(llm: LLM, requests: list[Request]) -> list[Any]:
    """The outputs of requests that are sent at once, in their order."""
    prompts = [prompt(llm, request) for request in requests]
    return llm.generate(prompts, [request.sampling for request in requests], use_tqdm=False)


def prompt(llm: LLM, request: Request) -> dict[str, Any]:
    """The prompt of a request, as an engine's `add_request` takes it."""
    videos = [(video, about(video)) for video in request.videos]
    media = {"image": list(request.images), "video": videos}
    given = {kind: items for kind, items in media.items() if items}
    data = {"multi_modal_data": given} if given else {}
    return {"prompt": request.text(llm.get_tokenizer())} | data


def about(video: np.ndarray) -> dict[str, Any]:
    """The metadata of a decoded video: all of its frames are given, at two per second."""
    frames, indices = len(video), list(range(len(video)))
    return {"fps": 2, "duration": frames / 2, "total_num_frames": frames, "frames_indices": indices}
