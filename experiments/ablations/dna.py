"""How many bits does a base of DNA cost, and does a longer context save any, up to 131,072 bases?

    python -m launch.sweep --config=experiments/ablations/dna.py --workdir=runs/dna

Cost: 6 minutes on one H200, estimated: 3 variants of 8 seeds, 40 s each, half a minute to score, and what is compiled.
Models have 5.3M parameters and read bytes, 16M of them; `python -m experiments.corpus` makes the text, the genome of
E. coli. A file is one document: rows are cut out of it and each begins with an empty state, so that bits_per_byte@L is
the mean over contexts of 0 to L - 1 bases. Rows of 8,192 are trained. Expect 1.88 to 1.98 bits (2 is chance; what is
published of compressors and models of bacterial genomes lies between), no more at 131,072 than at 8,192 for Mamba-3,
and more for the Transformer.
"""

import dataclasses

from experiments.ablations import language
from mamba3_jax.config import Config

VARIANTS = {
    "mamba3": {},
    "mamba2": {"model.pattern": "2" * 6, "model.d_ff": 528},
    "transformer": {"model.pattern": "A" * 6, "model.attn_rope_theta": 10000.0, "model.d_ff": 792},
}
SEEDS, LENGTHS = language.SEEDS, (1024, 8192, 32768, 131072)
METRIC = "bits_per_byte@131072"
SHOWN = tuple(f"bits_per_byte@{length}" for length in LENGTHS)
EXPECT = {
    "mamba3": ("mean bits_per_byte@131072", 1.88, 1.98),
    "mamba2": ("difference bits_per_byte@131072", -0.01, 0.05),
    "transformer": ("difference bits_per_byte@131072", 0.0, 5.0),
}


def get_config() -> Config:
    config = language.config("dna", vocab_size=256, d_model=256, d_ff=512)
    text = {"train_glob": "build/corpus/dna/train.txt", "valid_glob": "build/corpus/dna/valid.txt"}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer="bytes", **text, length=8192, batch=4),
        train=dataclasses.replace(config.train, steps=500, save_every=500),
    )
