"""Pruning in a paged cache, whatever engine owns it: plans, block tables, freed and fresh blocks.

A paged cache holds the tokens of a request in blocks, and a block table lists the blocks in the
order of the tokens. Layers with a block table of their own form a cache group. This package imports
torch and `plphp.policy`, and no engine. An engine's integration, such as `plphp.vllm`, passes it
queries, block ids and functions that read and write blocks.

    prompts     what is known of a prompt when its last token is computed, and of its plans
    choosing    the plans of all layers of a request
    compaction  scoring and moving the tokens of one layer
    tables      block tables of a batch in which some requests are pruned
    fixed       tensors at fixed addresses, for CUDA graphs
    blocks      the number of blocks that a request holds, needs, and gives back
"""

from __future__ import annotations
