"""A cluster is opened before anything is done to it or asked of it: its settings, its folder, its provider."""

from __future__ import annotations

from wasilet.providers import by_name
from wasilet.providers.base import Cluster
from wasilet.settings import Settings
from wasilet.state import State


def open_cluster(settings: Settings) -> Cluster:
    """The cluster that settings name, by the provider it was made with. Raises UsageError for an unknown provider."""
    state = State.of(settings)
    return Cluster(settings=settings, state=state, provider=by_name(state.cluster.provider or settings.provider))
