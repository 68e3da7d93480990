"""What a session on a device needs beside its options: weights in memory, and a check of where its nodes run."""

from __future__ import annotations

import weakref

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.ort.experimental.placement import RECORD, check_placement
from satchel.runtime.ort.experimental.weights_in_memory import hand_over_weights
from satchel.runtime.ort.providers import PROVIDERS, ProviderChoice

_weights: weakref.WeakKeyDictionary[ort.InferenceSession, list[NDArray[np.generic]]] = weakref.WeakKeyDictionary()
"""The memory that a session was given its weights in; it must stay as long as the session."""


class DeviceSession:
    """Prepares the options of one session, and checks the session that was opened with them."""

    def __init__(self, bundle: Bundle, name: str, options: ort.SessionOptions, choice: ProviderChoice) -> None:
        """Prepare for the graph file `name`. Raises BundleError if a weight does not lie in its file."""
        self._choice, self._path = choice, bundle.folder / name
        options.add_session_config_entry(RECORD, "1")
        self._arrays = hand_over_weights(bundle, name, options) if PROVIDERS[choice.name].whole_graphs else []

    def check(self, session: ort.InferenceSession) -> None:
        """Keep the weights with the session, and check where its nodes run. Warns and raises as `check_placement`."""
        _weights[session] = self._arrays
        check_placement(session, self._choice, self._path)
