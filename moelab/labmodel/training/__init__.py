"""How the shipped lab model was made: one command from text to checkpoint.

The steps, each a module with one job, in the order in which they run:

- `data`: text files to documents, and whole documents to splits;
- `chat`: instruction/answer pairs and the chat template;
- `tokenizer`: a byte-level BPE of 6,144 tokens;
- `batches`: documents to training sequences (packing, mixing, copying);
- `model`: a PyTorch twin of mlx-lm's `qwen3_next`;
- `quantisation`: what `mx.quantize` does to a weight, in PyTorch;
- `train`: the loop;
- `export`: weights to a folder that `mlx_lm.load` reads, at 4 bits;
- `evaluate`, `asking`, `routing`, `parity`, `picture`: every figure of the model card.

Run `python -m moelab.labmodel.training --help`. Training needs `moelab[train]`
(PyTorch); evaluation does not.
"""

from __future__ import annotations
