"""What docs/support.md says around its tables. `page` fills the gaps."""

TEXT = """---
hide: [toc]
---

# Families and modes

After this page you know whether your family of models is tested, and in which ways it may be run.

{overview}
A number is that of a [note](#notes) with the reason; "not applicable" without one means that the
family has no such input. For a class that is not listed, the image token id of its config says
which tokens are vision tokens, and each unbroken run of them is one image. Without an image token
id it is refused.

Each cell of the tables below is a test of plphp on a tiny random model of the real transformers
class, against an independent oracle: a full cache in which an attention mask hides the dropped
tokens. `make support` runs `tests/conformance/test_matrix.py` and writes this page.

## Families and prompts

Cells were run with these policies: {policies}. Each other policy
({sampled})
was run with every family and in every mode, in at least one cell.

<details markdown="1">
<summary>Every family with every kind of prompt</summary>

{0}

</details>

- Every cell with images checks that the spans are right, that selection and decoding equal the
  oracle's, that a policy that keeps everything gives the tokens of the unpruned model, that a row
  of a padded batch equals the row alone, and that the model is unchanged afterwards. Cells with
  beams, samples and chunks check that keeping everything changes no token, and that the selection
  is the oracle's.
- `internvl` and `smolvlm` mark the frames of a video as they mark images. Each frame counts as an
  image, and the report says so; `plphp.prune(model, vision_mask=...)` makes them one video.
- `gemma3` and `cohere2_vision` have layers with a sliding window. If a prompt is longer than the
  window, these layers are not pruned, and the report names them. The same holds for linear,
  convolutional and chunked layers, and for layers that share keys. The `llava + ...` lines are the
  LLaVA class with such decoders; they were run with plphp only.

## Ways to run a model

These families differ in positions, masks, image tokens or kinds of layers. Every cell was run with
plphp, and every mode also with one policy of each other kind ({others}).

<details markdown="1">
<summary>Every way to run a model, with nine families</summary>

{1}

</details>

- Greedy modes: a policy that keeps everything gives the tokens of the unpruned model. With pruning,
  the selection and all tokens are the oracle's.
- Later turns: the oracle computes the whole conversation at once and hides from each turn the
  tokens that earlier turns dropped. Selection, logits and tokens of every turn equal the oracle's,
  also if the cache is saved, moved, cropped or reordered between turns.
- Other weights, dtypes, attention implementations and devices: selection and logits are within 1e-4
  of the oracle's. For bfloat16 and float16 the tolerances are .5 and .05, and tokens are equal
  wherever the oracle's two highest logits differ by more. For mixtures of experts in half precision
  the median over steps counts, because rounding changes which experts are used.
- The FlashAttention cells use a function in torch in place of the kernel; names, layouts, windows
  and masks are those of transformers. int8 weights are torchao's. `device_map` puts every other
  layer on the disk. Tensor parallel runs two gloo processes.
- "The unpruned model" in a note: the same mode was run without plphp, and failed or gave other
  logits than a plain forward.

## With recall

[Recall](recall.md) parks the tokens that a policy drops; 40 % of the bytes stay on the device.
Every cell was run with plphp, and every other policy in at least one cell.

<details markdown="1">
<summary>Every mode, with three families</summary>

{2}

</details>

<details markdown="1">
<summary>Every family, with a padded batch</summary>

{3}

</details>

- Home `host`: the oracle hides, at each step, the tokens that the step did not attend to. Logits
  are within 1e-4 of the oracle's.
- Home `int4`: the oracle rounds the parked tokens. The median over steps is within 1e-4 and every
  step within 5e-3, because a value between two codes may be rounded either way.
- Later turns: the oracle's prompt attends to all images of the conversation, each earlier answer to
  the tokens that it attended to, and rounded tokens stay rounded. Beams are followed from row to
  row.
- The rest is as without recall.

## Notes

{notes}

{made}
"""
