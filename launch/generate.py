"""Sample text from a checkpoint.

    python -m launch.generate --workdir=DIR --prompt=TEXT [--prompt=MORE] [--tokens=200] [--temperature=1] [--top_k=0]
                              [--top_p=1] [--seed=0] [--stop=TEXT] [--step=N] [--tokenizer=tokenizer.json]
                              [--eos=TOKEN]

Prints each prompt with its continuation, then the speed. The workdir may also be a directory in the official layout.
Without a tokenizer, give ids by --prompt_ids=1,2,3; ids are printed then. A row ends where the model ends the document,
or before a --stop text, which may be a special token. The spelling of a special token in a prompt is read as that
token, and drawn ones are printed. An empty prompt starts from a document's end, where the model is weak: training never
scores what follows a separator.
"""

import os

import jax
from absl import flags

from launch.common import define_path, fail, run, user_errors
from launch.data import codec_of, data_with
from mamba3_jax.data.vocabulary import continuation
from mamba3_jax.generate import Sampling, generate
from mamba3_jax.load import build, load_run
from mamba3_jax.prompts import check

WORKDIR = define_path("workdir", None, "a workdir, or a directory in the official layout", required=True)
PROMPT = flags.DEFINE_multi_string("prompt", None, "text to continue; may be given again")
PROMPT_IDS = flags.DEFINE_multi_string("prompt_ids", None, "a prompt as comma-separated token ids; may be given again")
TOKENS = flags.DEFINE_integer("tokens", 200, "how many tokens to draw at most")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: from all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that hold this much of the probability")
SEED = flags.DEFINE_integer("seed", 0, "seed of the draws", lower_bound=0, upper_bound=2**32 - 1)
STOP = flags.DEFINE_multi_string("stop", None, "end before this text or special token; may be given again")
STOP_IDS = flags.DEFINE_string(
    "stop_ids", None, "end at one of these token ids, comma-separated; default the end of a document; empty: at none"
)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default the newest")
TOKENIZER = define_path("tokenizer", None, "tokenizer.json instead of the checkpoint's own")
EOS = flags.DEFINE_string("eos", None, "the token, or its id, that ends a document; default as data.eos of the config")
COMPUTE_DTYPE = flags.DEFINE_string("compute_dtype", None, "float32 or bfloat16; default as trained")


def ids(text: str) -> list[int]:
    """Read "1,2,3" as numbers."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{text!r} is not a comma-separated list of token ids") from None


def prompts_of(codec) -> list[list[int]]:
    """Read the prompts as ids; an empty one is the end of a document."""
    if codec is None and (PROMPT.value or STOP.value or not PROMPT_IDS.value):
        raise ValueError("this checkpoint names no tokenizer: give --tokenizer=tokenizer.json or --prompt_ids=1,2,3")
    if not PROMPT.value and not PROMPT_IDS.value:
        raise ValueError("flag --prompt=TEXT is missing")
    for name, texts in (("prompt", PROMPT.value), ("stop", STOP.value)):
        check_utf8(name, texts or [])
    given = [codec.encode(text) for text in PROMPT.value or []]
    for text, prompt in zip(PROMPT.value or [], given, strict=True):
        if text and not prompt:
            raise ValueError(f"--prompt={text!r} has no token in the tokenizer's vocabulary")
    given += [ids(text) for text in PROMPT_IDS.value or []]
    if codec and codec.eos is not None:
        given = [prompt or [codec.eos] for prompt in given]
    return given


def echoes_of(codec) -> list[str]:
    """Return the prompts to print, in the order of `prompts_of`: as they were given, or the text of ids."""
    given = [codec.decode(ids(text)) if codec else text for text in PROMPT_IDS.value or []]
    return [*(PROMPT.value or []), *given]


def check_utf8(name: str, texts: list[str]) -> None:
    """Raise ValueError for the first value of a flag whose bytes on the command line were not UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"--{name}={os.fsencode(text)!r} is not UTF-8") from None


def stop_ids_of(codec) -> list[int]:
    """Read --stop_ids, by default the end of a document where there is one; add the special tokens of --stop."""
    if STOP_IDS.value is not None:
        given = ids(STOP_IDS.value)
    else:
        given = [codec.eos] if codec and codec.eos is not None else []
    special = [codec.special(text) for text in STOP.value or []]
    return given + [token for token in special if token is not None]


def main(_argv):
    with user_errors():
        sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
        sampling.check()
        config, params = load_run(WORKDIR.value, step=STEP.value)
        how = {"compute_dtype": COMPUTE_DTYPE.value} if COMPUTE_DTYPE.value else {}
        data = data_with(config.data, TOKENIZER.value, EOS.value)
        model, codec = build(config, **how), codec_of(data, config.model.vocab_size)
        prompts, stops, stop_ids = prompts_of(codec), STOP.value or [], stop_ids_of(codec)
        if "" in stops:
            raise ValueError("--stop= is empty: it would stop before the first token")
        options = {"tokens": TOKENS.value, "sampling": sampling, "stop_ids": stop_ids}
        check(model, prompts, **options, params=params)

    # Spell rows after some token, whichever: a decoder may drop a space where the ids begin.
    before = prompts[0][-1:]
    stop = (lambda row: any(text in continuation(codec, before, row) for text in stops)) if stops else None
    try:
        result = generate(model, params, prompts, seed=SEED.value, stop=stop, **options)
    except FloatingPointError as error:
        fail(f"{WORKDIR.value}: {error}")
    if jax.process_index():  # with several processes, all have the same rows
        return
    for echo, prompt, row in zip(echoes_of(codec), prompts, result.ids, strict=True):
        print(show(codec, echo, prompt, row, stops), flush=True)
    print(f"[{result}]", flush=True)


def show(codec, echo: str, prompt, row, stops) -> str:
    """Join a prompt as it was given and its continuation, as text up to the first stop text or as ids."""
    if codec is None:
        return ",".join([echo, *map(str, row)])
    text = continuation(codec, prompt, row)
    ends = [text.find(stop) for stop in stops]
    return echo + text[: min([end for end in ends if end >= 0], default=len(text))]


if __name__ == "__main__":
    run(main)
