"""Which model a command uses when none is named, and names that no model has."""

import pytest

from minigpt3d import hub


def test_the_bundled_model_is_the_default(tmp_path, monkeypatch):
    assert hub.default_model() == str(hub.BUNDLED_MODEL)
    monkeypatch.setattr(hub, "BUNDLED_MODEL", tmp_path)
    with pytest.raises(ValueError, match="bundled"):  # never a Hub id that nobody asked for
        hub.default_model()


def test_a_name_without_owner_is_refused_without_asking_the_hub(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi", fail)
    monkeypatch.setattr("minigpt3d.modeling_minigpt3d.MiniGPT3DForConditionalGeneration.from_pretrained", fail)
    with pytest.raises(ValueError, match="OWNER/NAME"):
        hub.load_model("nonsense")
    with pytest.raises(ValueError, match="empty"):  # not the working directory
        hub.load_model("")
