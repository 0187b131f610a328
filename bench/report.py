"""Names that files which are about to be replaced still import from here."""

from bench.measure.machine import ROOT, device_name, machine_info
from bench.measure.results import FOLDER as RESULTS
from bench.measure.results import VERSION, table

__all__ = ["RESULTS", "ROOT", "VERSION", "device_name", "machine_info", "table", "write_json"]


def write_json(path, benchmarks, device, machine=None):
    from bench.measure import results

    results.write(path, benchmarks, machine or machine_info(device))
