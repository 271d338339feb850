"""Looking into a forward pass: what autograd keeps of it, and where it drops."""

import torch

from pipeline.counter_rng import DropoutSite

_draw_mask = DropoutSite.keep_mask


def saved_elements(forward):
    """Count the elements that autograd saves while `forward()` runs."""
    total = 0

    def count(tensor):
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward()
    return total


def drop_only(monkeypatch, dropped):
    """Let one site (layer, where) drop and no other; returns a list that fills with all sites."""
    seen = []

    def keep_mask(site, shape, p):
        seen.append(((site.layer, site.where), tuple(shape)))
        mask = _draw_mask(site, shape, p)
        return mask if (site.layer, site.where) == dropped else torch.ones_like(mask)

    monkeypatch.setattr(DropoutSite, "keep_mask", keep_mask)
    return seen
