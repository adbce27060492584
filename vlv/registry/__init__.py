"""The model registry: versions with their lineage, the gates to `champion`, and the history of champions."""

from vlv.registry.policy import Policy, PolicyError, load_policy
from vlv.registry.promotion import (
    HistoryEntry,
    Promotion,
    PromotionRefused,
    history,
    promote,
    rollback,
)
from vlv.registry.registration import AUTOENCODER, CAPTIONER, Served, lineage, register
from vlv.registry.versions import (
    CHALLENGER,
    CHAMPION,
    RegistryError,
    Version,
    fetch,
    list_models,
)

__all__ = [
    "AUTOENCODER",
    "CAPTIONER",
    "CHALLENGER",
    "CHAMPION",
    "HistoryEntry",
    "Policy",
    "PolicyError",
    "Promotion",
    "PromotionRefused",
    "RegistryError",
    "Served",
    "Version",
    "fetch",
    "history",
    "lineage",
    "list_models",
    "load_policy",
    "promote",
    "register",
    "rollback",
]
