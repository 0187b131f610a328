"""The table of tuned launches: read as it is written, and shipped with the package."""

import json
from importlib.resources import files

from s2kernels.kernels import tuned

LAUNCH = {"arch": "sm_90", "op": "linear", "dtype": "half", "sizes": [8, 4]}
FASTER = {"device": "GPU", "op": "linear", "dtype": "bfloat16", "sizes": [8, 4]}


def test_rows_become_the_tables_that_launchers_look_into(tmp_path):
    path = tmp_path / "tuned.json"
    rows = [{**LAUNCH, "tokens": 64, "launch": {}}, {**LAUNCH, "tokens": 512, "launch": {"A": 1}}]
    faster = [{**FASTER, "tokens": [[64, 96], [512, 2048]]}]
    path.write_text(json.dumps({"launch": rows, "faster": faster}))
    assert tuned.read(path) == (
        {("sm_90", "linear", "half"): {(8, 4): {64: {}, 512: {"A": 1}}}},
        {("GPU", "linear", "bfloat16"): {(8, 4): ((64, 96), (512, 2048))}},
    )


def test_the_package_has_its_table():
    path = files("s2kernels.kernels") / "tuned.json"
    assert path.is_file()
    assert tuned.read(tuned.PATH) == (tuned.LAUNCH, tuned.FASTER)
