"""`fastmim tokenizer train`: `fastmim train` for what BEiT and CAE predict.

`deepspeed fastmim/train.py --method dvae` is the same on several ranks.
"""

import sys

USAGE = """usage: fastmim tokenizer train --tokenizer dvae|dvae_large|vq|kmeans [flags of fastmim train]

What is kept is RUN_DIR/tokenizer.safetensors; `--method.tokenizer RUN_DIR` hands it to beit and cae.
`fastmim train --method dvae --help` lists all flags."""


def for_train(arguments: list[str]) -> list[str] | None:
    """The arguments of `fastmim train`; None after the usage. Exits with 2 on what cannot be."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return None
    if arguments[0] != "train":
        print(f"fastmim: error: tokenizer: want train, got {arguments[0]!r}\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    from fastmim.flags import is_on, value_of, without
    from fastmim.methods.tokenizers import TRAININGS

    given = arguments[1:]
    kind = value_of(given, "tokenizer")
    if kind is None and not is_on(given, "resume"):
        print(f"fastmim: error: tokenizer: want --tokenizer {'|'.join(TRAININGS)}, got none", file=sys.stderr)
        sys.exit(2)
    if kind is not None and kind not in TRAININGS:
        print(f"fastmim: error: tokenizer: want one of {', '.join(TRAININGS)}, got {kind!r}", file=sys.stderr)
        sys.exit(2)
    chosen = [] if kind is None else ["--method", kind]
    return [*chosen, *without(given, {"tokenizer"})]
