"""Remote execution, as far as it can be tested without the service: nnsight's simulation of the way there, and consent."""

import families
import pytest
import torch

from helpers import remote, tracing
from helpers.interventions import Intervention, KnockOut
from helpers.models import load_model
from helpers.sites import TracingError


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_simulation_gives_what_tracing_gives(family, tmp_path, capsys):
    folder = str(families.save(family, tmp_path))
    model, prompts = load_model(folder, device="cpu"), families.prompts()
    sites = [("resid_post", 1), ("attn_out", 0), ("mlp_out", 2), ("head", 1)]
    value = torch.randn(5, 9, 32, generator=torch.Generator().manual_seed(0))
    heads = torch.randn(5, 9, 2, model.d_head, generator=torch.Generator().manual_seed(1))
    edits = [Intervention("mlp_out", 1, "subject", value), Intervention("attn_out", 0, "last", value[:, 0], "add"),
             Intervention("head", 2, "all", heads, heads=[3, 1])]
    theirs = remote.run(folder, prompts, edits, sites, agreed=True, where="local")
    ours = tracing.intervene(model, prompts, edits, sites)
    torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-5, rtol=1e-5)
    for site in sites:
        torch.testing.assert_close(theirs[site], ours[site], atol=1e-5, rtol=1e-5)
    assert (ours.logits - tracing.read(model, prompts).logits).abs().max() > 1e-3
    assert "5 prompts and 3 interventions go to a simulation of NDIF" in capsys.readouterr().out


def test_nothing_leaves_without_consent():
    with pytest.raises(TracingError, match="would send 5 prompts and 0 interventions to NDIF.*agreed=True"):
        remote.run("any/model", families.prompts())


def test_what_cannot_be_done_there():
    prompts = families.prompts()
    for edit in (KnockOut(1, "last", "subject"), Intervention("mlp_out", 1, "last", op="mean")):
        with pytest.raises(TracingError, match="only given values can be set or added"):
            remote.run("any/model", prompts, [edit], agreed=True)
    with pytest.raises(TracingError, match="there are ndif, local"):
        remote.run("any/model", prompts, where="elsewhere")


def test_what_ndif_would_refuse_is_refused_here(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(remote.CONFIG.API, "APIKEY", None)
    for name in (str(tmp_path), "tiny-llama3"):
        with pytest.raises(TracingError, match=f"{name} lies on this machine: NDIF serves models by hub id"):
            remote.run(name, families.prompts(), agreed=True)
    with pytest.raises(TracingError, match="no key of an NDIF account: set NDIF_API_KEY"):
        remote.run("any/model", families.prompts(), agreed=True)
    assert "go to NDIF" not in capsys.readouterr().out
