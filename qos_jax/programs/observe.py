"""Makes a fleet file of a gateway's log: a world in which routers can be trained for these engines.

qos-jax gateway --fleet=fleet.toml --router=round_robin --out=runs/log
qos-jax observe --log=runs/log --fleet=fleet.toml --out=runs/observed
qos-jax train --fleet=runs/observed/fleet.toml --observe=proxy --scrape=0.5 --out=runs/mvr

Written are

* observed.json: ``requests`` (rate, law of arrivals, lengths, how well lengths are predicted) and ``engines``, each its
  fitted ``timing``, ``link_delay_s`` and ``errors``: measured and simulated times of a replay of the log, of the
  requests that were fitted and of the later ones that were held out;
* profile-*.json, the timing of each engine;
* requests.csv, the log as a trace for --trace and --trace_lengths;
* fleet.toml, the given file with these profiles, link delays, mean lengths and law of requests.
"""

from __future__ import annotations

from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.fleet.fleet_file import load_fleet
from qos_jax.gateway.request_log import read_requests
from qos_jax.io.files import writable_folder
from qos_jax.io.provenance import command_of, made_by


def main(values: FlagValues) -> None:
    """Reads the log, fits, writes the files and prints what was found."""
    try:
        from qos_jax.gateway.observed import FLEET, observe, write_observed
    except ImportError as error:
        raise InputError(f"qos-jax observe needs {error.name}: pip install 'qos_jax[gateway]'") from error
    fleet, records = load_fleet(values.fleet), read_requests(values.log)
    observed = observe(records, fleet)
    folder = writable_folder(values.out)
    write_observed(observed, records, fleet, folder, made_by(command_of("observe")))
    load_fleet(folder / FLEET)  # what was written is a fleet file
    print(observed.as_text())
    print(f"wrote {folder / FLEET}")
