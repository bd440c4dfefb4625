"""transformers reads the sources of its models once, and knows the same names as without us."""

import json
import subprocess
import sys
from types import SimpleNamespace

from mlx_ifp.fast_import import mend

CODE = """
import json, sys
if sys.argv[1] == "fast":
    from mlx_ifp.fast_import import import_transformers
    import_transformers()
    import_transformers()
import transformers, transformers.models
scan = transformers.utils.import_utils.create_import_structure_from_path
names = sorted(transformers.__all__), sorted(transformers.models.__all__)
print(json.dumps([scan.cache_info().misses, scan.cache_info().currsize, names]))
"""


def scanned(how: str) -> tuple[int, int, list]:
    """Folders that were scanned, folders remembered, and the names that were found."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def test_every_folder_is_scanned_once():
    folders, remembered, names = scanned("fast")
    # The folder of all is named in two ways.
    assert folders == remembered
    before, _, same = scanned("plain")
    assert names == same
    assert folders <= before


def test_what_mlx_lm_silences_stays_silent():
    """transformers says on stderr that PyTorch is missing, unless it is told not to."""
    code = (
        "import os; os.environ.pop('TRANSFORMERS_NO_ADVISORY_WARNINGS', None)\n"
        "import sys; sys.modules['torch'] = None\n"
        "from mlx_ifp.fast_import import import_transformers as run; run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_another_transformers_is_left_as_it_is():
    other = SimpleNamespace(create_import_structure_from_path=len)
    mend(other)
    assert vars(other) == {"create_import_structure_from_path": len}


def test_names_are_found_where_the_last_list_begins():
    scanner = SimpleNamespace(fetch__all__=lambda source: source)
    mend(scanner)
    assert scanner.fetch__all__("x\n__all__ = 1\ny\n__all__ = 2\n") == "__all__ = 2\n"
    assert scanner.fetch__all__("nothing") == "nothing"
