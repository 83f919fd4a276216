"""Engines in the test's process, random requests, and the answers of transformers to them."""

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
from plphp.demo.model import WEIGHTS, Embedded

LAYERS: int = json.loads((WEIGHTS / "config.json").read_text())["text_config"]["num_hidden_layers"]
BLOCK = 32  # the least that vLLM's CPU attention takes
MARGIN = 1e-3  # two implementations may order logits that are closer than this differently
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


@dataclass(frozen=True)
class Answer:
    """An answer of transformers.

    margins: difference of the two highest logits at each token
    report: plphp's; length: tokens of the prompt
    """

    tokens: list[int]
    margins: list[float]
    report: Any
    length: int


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
            request = replace(before, images=more, policy=request.policy)
        elif changed == "video first":
            order = ("video", *["image"] * len(request.images))
            request = replace(request, videos=(film(rng, 4),), order=order)
        out.append(request)
    return out


def answer(embedded: Embedded, request: Request, round_to: int = BLOCK) -> Answer:
    """The answer of plphp on transformers, with `round_to` equal to the engine's block size."""
    inputs = embedded.inputs_of(request.images, request.text(embedded.tokenizer))
    return read(embedded.model, inputs, request, round_to)


def read(
    model: Any, inputs: Any, request: Request, round_to: int = BLOCK, mask: Any = None
) -> Answer:
    """The answer of any model in transformers. mask: (1, N), the `vision_mask` of `plphp.prune`."""
    policy = rounded(request.policy or plphp.PLPHP(r=1, delta_r=0), round_to)
    with plphp.prune(model, policy, vision_mask=mask) as pruning:
        out = model.generate(
            **inputs,
            max_new_tokens=request.tokens,
            min_new_tokens=request.tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    length = inputs["input_ids"].shape[1]
    margins = [float(logits[0].topk(2).values.diff().abs()) for logits in out.logits]
    return Answer(out.sequences[0, length:].tolist(), margins, pruning.report, length)


def rounded(policy: Any, round_to: int) -> Any:
    """The policy, which drops tokens by multiples of `round_to`, an option of PLPHP only."""
    if isinstance(policy, plphp.PLPHP):
        return replace(policy, round_to=round_to)
    kind = type(policy)
    return type(kind.__name__, (kind,), {"round_to": round_to})(**asdict(policy))


@contextlib.contextmanager
def engine(policy: Any = None, **options: Any) -> Iterator[LLM]:
    """A vLLM engine of the embedded model; `stock=True` for one without pruning."""
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


def same(output: Any, expected: Answer) -> bool | None:
    """Whether tokens are equal; None where they first differ at nearly equal logits."""
    found = list(output.outputs[0].token_ids)
    for mine, theirs, margin in zip(found, expected.tokens, expected.margins, strict=True):
        if mine != theirs:
            return None if margin < MARGIN else False
    return True
