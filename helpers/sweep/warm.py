"""What every run would spend its first seconds importing; the process that runs are forked from imports it once.

None of our own modules: a run must see them as they are when it starts.
"""

import contextlib
import importlib
import signal

# Ctrl-C in a terminal reaches this process too, and is for the driver alone: it ends this one
signal.signal(signal.SIGINT, signal.SIG_IGN)

PACKAGES = (
    "torch transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto nnsight safetensors.torch "
    "sklearn.linear_model scipy.stats pandas pyarrow.parquet matplotlib.pyplot seaborn pydantic yaml huggingface_hub "
    "nbformat nbconvert papermill ipykernel.kernelapp jupyter_client.provisioning"
).split()

for package in PACKAGES:
    # a package that cannot be imported stops the notebook that needs it, with its message
    with contextlib.suppress(Exception):
        importlib.import_module(package)
