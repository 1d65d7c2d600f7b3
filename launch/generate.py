"""Sample text from a checkpoint.

    python -m launch.generate --workdir=DIR --prompt=TEXT [--prompt=MORE] [--tokens=200] [--temperature=1] [--top_k=0]
                              [--top_p=1] [--seed=0] [--stop=TEXT] [--step=N] [--tokenizer=tokenizer.json]

Prints each prompt with what followed it, then the speed. The workdir may also be a directory in the official layout.
Without a tokenizer, --prompt_ids=1,2,3 gives ids and ids are printed. A row ends where the model ends the document.
An empty prompt starts from a document's end, where the model is weak: training never scores what follows a separator.
"""

import dataclasses

from absl import flags

from launch.common import codec_of, define_path, fail, run, user_errors
from mamba3_jax.generate import Sampling, check, generate
from mamba3_jax.load import build, load_run

WORKDIR = define_path("workdir", None, "a workdir, or a directory in the official layout", required=True)
PROMPT = flags.DEFINE_multi_string("prompt", None, "text to continue; may be given again")
PROMPT_IDS = flags.DEFINE_multi_string("prompt_ids", None, "a prompt as comma-separated token ids; may be given again")
TOKENS = flags.DEFINE_integer("tokens", 200, "how many tokens to draw at most")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: from all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that hold this much of the probability")
SEED = flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0, upper_bound=2**32 - 1)
STOP = flags.DEFINE_multi_string("stop", None, "end before this text; may be given again")
STOP_IDS = flags.DEFINE_string(
    "stop_ids", None, "end at one of these token ids, comma-separated; default the end of a document; empty: at none"
)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default the newest")
TOKENIZER = define_path("tokenizer", None, "tokenizer.json, where the checkpoint names none or another")
COMPUTE_DTYPE = flags.DEFINE_string("compute_dtype", None, "float32 or bfloat16; default as trained")


def ids(text: str) -> list[int]:
    """ "1,2,3" as numbers."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{text!r} is not a comma-separated list of token ids") from None


def prompts_of(codec) -> list[list[int]]:
    """The flags as ids; an empty prompt is the end of a document."""
    if codec is None and (PROMPT.value or STOP.value or not PROMPT_IDS.value):
        raise ValueError("this checkpoint names no tokenizer: give --tokenizer=tokenizer.json or --prompt_ids=1,2,3")
    if not PROMPT.value and not PROMPT_IDS.value:
        raise ValueError("flag --prompt=TEXT is missing")
    given = [codec.encode(text) for text in PROMPT.value or []] + [ids(text) for text in PROMPT_IDS.value or []]
    if codec and codec.eos is not None:
        given = [prompt or [codec.eos] for prompt in given]
    return given


def stop_ids_of(codec) -> list[int]:
    """--stop_ids as numbers; without the flag, the end of a document where there is one."""
    if STOP_IDS.value is not None:
        return ids(STOP_IDS.value)
    return [codec.eos] if codec and codec.eos is not None else []


def main(_argv):
    with user_errors():
        sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
        sampling.check()
        config, params = load_run(WORKDIR.value, step=STEP.value)
        how = {"compute_dtype": COMPUTE_DTYPE.value} if COMPUTE_DTYPE.value else {}
        data = dataclasses.replace(config.data, tokenizer=TOKENIZER.value or config.data.tokenizer)
        model, codec = build(config, **how), codec_of(data, config.model.vocab_size)
        prompts, stops = prompts_of(codec), STOP.value or []
        stop_ids = stop_ids_of(codec)
        if "" in stops:
            raise ValueError("--stop= is empty: it would stop before the first token")
        options = {"tokens": TOKENS.value, "sampling": sampling, "stop_ids": stop_ids}
        check(model, prompts, **options)

    stop = (lambda row: any(text in codec.decode(row) for text in stops)) if stops else None
    try:
        result = generate(model, params, prompts, seed=SEED.value, stop=stop, **options)
    except FloatingPointError as error:
        fail(f"{WORKDIR.value}: {error}")
    for prompt, row in zip(prompts, result.ids, strict=True):
        print(show(codec, prompt, row, stops), flush=True)
    print(f"[{result}]", flush=True)


def show(codec, prompt, row, stops) -> str:
    """Prompt and continuation, as text up to the first stop text, or as ids."""
    if codec is None:
        return ",".join(map(str, [*prompt, *row]))
    prompt = [token for token in prompt if token != codec.eos]
    before, text = codec.decode(prompt), codec.decode([*prompt, *row])
    ends = [text.find(stop, len(before)) for stop in stops]
    return text[: min([end for end in ends if end >= 0], default=len(text))]


if __name__ == "__main__":
    run(main)
