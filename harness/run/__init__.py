"""What a run is: its identity, its folder, its manifest, and the lock that keeps it to one process.

Knows no stage, no model, no table and no experiment.

identity.py     fingerprint and run_id
paths.py        what its files are called
manifest.py     what it says of itself, part by part; differences.py: how two of those differ
manifest_file.py  where it says so
lock.py         who computes it
find.py         the runs of a folder
tensors.py      its files of tensors, read as a stranger's
"""

from harness.run.find import RunEntry as RunEntry
from harness.run.find import find_run as find_run
from harness.run.find import list_runs as list_runs
from harness.run.identity import fingerprint as fingerprint
from harness.run.identity import new_run_id as new_run_id
from harness.run.lock import choosing as choosing
from harness.run.lock import is_held as is_held
from harness.run.lock import locked as locked
from harness.run.lock import make_folder as make_folder
from harness.run.lock import new_run as new_run
from harness.run.manifest import Manifest as Manifest
from harness.run.manifest import own_setting as own_setting
from harness.run.manifest import seed_of as seed_of
from harness.run.manifest import setting as setting
from harness.run.manifest import state as state
from harness.run.manifest_file import MANIFEST_BYTES as MANIFEST_BYTES
from harness.run.manifest_file import ManifestFile as ManifestFile
from harness.run.manifest_file import now_text as now_text
from harness.run.manifest_file import read_manifest as read_manifest
from harness.run.manifest_file import read_manifest_file as read_manifest_file
from harness.run.paths import RunPaths as RunPaths
