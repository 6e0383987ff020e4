import pytest

from cachepress.hf import recording, steps


@pytest.fixture
def replays(monkeypatch):
    """The steps that were replayed, while they are recorded on this processor."""
    found, real = [], recording.Recording.step

    def step(self, asked):
        found.append(len(asked.ids))
        return real(self, asked)

    monkeypatch.setattr(recording.Recording, "step", step)
    monkeypatch.setattr(steps, "records_on", lambda device: True)
    monkeypatch.setattr(steps, "_LATEST", type(steps._LATEST)())
    return found
