"""What is kept of a trained `ReFT`: folders, the hub, other libraries' formats, merged weights."""

from reftlens.storage.control_vector import save_control_vector
from reftlens.storage.folder import load, load_run, save
from reftlens.storage.hub import from_hub, push_to_hub
from reftlens.storage.merge import merged_weights, save_merged
from reftlens.storage.pyreft import load_pyreft, save_pyreft
from reftlens.storage.sae import SparseAutoencoder, load_sae

__all__ = [
    "SparseAutoencoder",
    "from_hub",
    "load",
    "load_pyreft",
    "load_run",
    "load_sae",
    "merged_weights",
    "push_to_hub",
    "save",
    "save_control_vector",
    "save_merged",
    "save_pyreft",
]
