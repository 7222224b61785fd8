"""`horizon plan`: what a run would use and how long its steps would take, without allocating anything."""

from __future__ import annotations

import json

from horizon.errors import ConfigError

DEFAULT_MODEL = "tiny_llama"  # of conf/config.yaml
USAGE = """\
usage: horizon plan [--json] [machine=FILE] [key=value ...]

What `horizon train` with the same settings would use and how long a step would take, on this machine or on one that a
file describes. Reads no weights, allocates nothing, and keeps the shape of the model in the cache folder, which makes
the next plan quicker. Exit code 1 where it does not fit.

  --json         print one JSON object and nothing else
  machine=FILE   a machine file, or one that Horizon brings along: {machines}

  horizon plan model=qwen2.5-7b train.batch_size=32 train.seq_len=1024 memory.device_budget=24GiB machine=h200
  horizon plan model.path=FOLDER_WITH_CONFIG_JSON memory.host_budget=2TiB machine=my.yaml --json
"""


def run(arguments: list[str]) -> int:
    """The command; gives its exit code.

    Raises:
        HorizonError: settings, model or machine cannot be understood.
    """
    from horizon.config.compose import compose, load_machine, machine_names

    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE.format(machines=", ".join(machine_names())), end="")
        return 0
    flags = [argument for argument in arguments if argument.startswith("-")]
    if set(flags) - {"--json"}:
        raise ConfigError(
            f"horizon plan has no flag {min(set(flags) - {'--json'})}; expected --json (horizon plan --help)"
        )
    machines = _values(arguments, "machine")
    config = compose([a for a in arguments if a not in flags and not a.startswith("machine=")])
    machine = load_machine(machines[-1]) if machines else None
    name = config.model.path or (_values(arguments, "model") or [DEFAULT_MODEL])[-1]

    from horizon.forecast.here import this_machine  # after misspelt settings had their chance: loads torch
    from horizon.forecast.imagined import Forecaster
    from horizon.forecast.machine import target_of
    from horizon.forecast.outlook import look
    from horizon.forecast.report import as_json, as_text
    from horizon.forecast.shapes import open_shape
    from horizon.forecast.zeroth_order import forecast_zeroth_order, zeroth_order_json, zeroth_order_text
    from horizon.optimizers import make_optimizer
    from horizon.plan.facts import read_facts
    from horizon.run_settings import check_settings, with_lr
    from horizon.zo.settings import ZerothOrder

    check_settings(config)
    facts = this_machine() if machine is None else read_facts(machine, f"machine={machines[-1]}")
    target = target_of(facts, config.device, here=machine is None)
    model = open_shape(config)
    optimizer = make_optimizer(with_lr(config, None))
    if isinstance(optimizer, ZerothOrder):
        forecast = forecast_zeroth_order(model, target, optimizer, config)
        if flags:
            print(json.dumps(zeroth_order_json(forecast, name, model, target), indent=2))
        else:
            print(zeroth_order_text(forecast, name, target))
        return 0 if forecast.plan is not None else 1
    outlook = look(Forecaster(model, target), config)
    if flags:
        print(json.dumps(as_json(outlook, config, name, model, target), indent=2))
    else:
        print(as_text(outlook, name, target))
    return 0 if outlook.forecast is not None else 1


def _values(arguments: list[str], key: str) -> list[str]:
    """What the arguments set `key` to."""
    return [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{key}=")]
