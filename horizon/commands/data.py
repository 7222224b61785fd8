"""`horizon data preview`: what `horizon train` with the same settings would train on."""

from __future__ import annotations

from horizon.errors import ConfigError

USAGE = """\
usage: horizon data preview [--samples N] [--chars N] [key=value ...]

What `horizon train` with the same settings would train on: decoded samples with the trained tokens marked, a histogram
of lengths, what is dropped, truncated or left out, tokens of an epoch, and the epochs that the run would see. Allocates
no model.

  --samples N   of each source (default 2)
  --chars N     of each sample (default 2000)

  horizon data preview model.path=FOLDER_OR_HUB_ID data=messages data.path=chats.jsonl train.seq_len=2048
"""


def run(arguments: list[str]) -> int:
    """The command; gives its exit code.

    Raises:
        HorizonError: settings or data cannot be understood.
    """
    if not arguments or arguments[0] in ("-h", "--help") or {"-h", "--help"} & set(arguments[1:]):
        print(USAGE, end="")
        return 0
    if arguments[0] != "preview":
        raise ConfigError(f"horizon data {arguments[0]} is no command; expected preview (horizon data --help)")
    from horizon.config.compose import compose

    rest = arguments[1:]
    samples, chars = _taken(rest, "--samples", 2), _taken(rest, "--chars", 2000)
    flags = [argument for argument in rest if argument.startswith("-")]
    if flags:
        raise ConfigError(f"horizon data preview has no flag {flags[0]} (horizon data --help)")
    config = compose(rest)

    from horizon.data import load_run_data  # after misspelt settings had their chance: loads transformers
    from horizon.data.preview import preview
    from horizon.models.sources import resolve_model
    from horizon.run_settings import check_settings

    check_settings(config)
    model = config.model
    source = None if model.path is None else resolve_model(model.path, model.revision, model.trust_remote_code)
    print(preview(load_run_data(config, source), config, samples, chars))
    return 0


def _taken(arguments: list[str], flag: str, default: int) -> int:
    """The number behind `flag`, both of which are removed from the arguments."""
    if flag not in arguments:
        return default
    at = arguments.index(flag)
    value = arguments[at + 1] if at + 1 < len(arguments) else ""
    if not value.isdigit():
        raise ConfigError(f"{flag} {value}: expected a number")
    del arguments[at : at + 2]
    return int(value)
