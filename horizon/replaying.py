"""What `horizon replay` does: the steps of a log onto the weights that its run began with, and a folder written."""

from __future__ import annotations

from horizon.data.tokenizer import given_tokenizer
from horizon.engine import Engine
from horizon.errors import ConfigError
from horizon.models.source import resolve_model
from horizon.zo.replay import read_log


def replay(
    base: str, log: str, out: str, device: str = "auto", dtype: str = "float32", trust_remote_code: str = "false"
) -> str:
    """Rebuild a run's model in the folder `out`; gives a sentence on what was done.

    Raises:
        HorizonError: the log cannot be read or belongs to another model; nothing is written.
    """
    if trust_remote_code not in ("true", "false"):
        raise ConfigError(f"trust_remote_code={trust_remote_code!r}: expected true or false")
    trust = trust_remote_code == "true"
    source, beginning = resolve_model(base, trust_remote_code=trust), read_log(log).beginning
    tokenizer = given_tokenizer("auto", source.folder, trust_remote_code=trust)
    with Engine.from_pretrained(
        str(source.folder), optimizer=beginning.settings, freeze=beginning.freeze, device=device, max_grad_norm=None,
        lora=beginning.adapter, seed=beginning.settings.seed, trust_remote_code=trust, self_check=False,
    ) as engine:  # fmt: skip
        steps = engine.replay(log)
        engine.save_pretrained(out, tokenizer=tokenizer, dtype=dtype)
    return f"replayed {steps} steps of {log} onto {base}: {out}"
