"""The review app's pages of semantic gravity; their files are the app's own."""

from pathlib import Path

from harness.experiments.experiment import Page

PAGES = (
    Page(
        "pressure",
        "P_sem",
        Path("gravity/pressure.py"),
        remarks=("empty", "cut", "one_outcome", "one_bin", "fit", "split"),
    ),
    Page("detections", "Detections", Path("gravity/detections.py"), remarks=("empty", "cut", "one_outcome")),
    Page("attention", "Attention", Path("gravity/attention.py"), remarks=("empty", "one_outcome")),
    Page("layers", "Layers", Path("gravity/layers.py"), remarks=("empty", "one_outcome", "split")),
    Page("patching", "Patching", Path("gravity/patching.py"), remarks=("one_outcome", "one_bin", "split")),
    Page("activations", "Activations", Path("gravity/activations.py")),
    Page("prompt", "Prompt", Path("gravity/prompt.py")),
)
