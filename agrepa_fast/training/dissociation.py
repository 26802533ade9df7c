"""SCD of a run: what its layers store of its teachers, measured on held-out clips, beside the probe's scores.

hidden [L, N, D] is pooled over the valid frames, at the middle t of the probe's grid; a teacher's features are [N, W].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..attribution.runner import probing
from ..attribution.scd import Stored
from ..attribution.stored import lasp, linear_cka, pooled_hidden
from ..data.dataset import ClipDataset
from ..data.features import FeatureSource
from ..models.flow import probe_inputs
from ..teachers.base import Teacher
from .clips import fixed_batches, spread
from .config import RunConfig
from .objective import Backbone
from .targets import domain_tables, pooled_features

CLIPS = 8  # clips of each domain, if so many are held out: half to fit the head on, half to measure on


def stored_by_layer(
    backbone: Backbone,
    teachers: Mapping[str, Teacher | FeatureSource],
    dataset: ClipDataset,
    config: RunConfig,
    device: torch.device,
    bf16: bool = False,
) -> list[Stored]:
    """LASP and linear CKA for each domain, with the first teacher that is used for it.

    Each domain has one frozen head, shared by all layers and fitted on every other held-out clip. All of it takes one
    forward, since FoG-A needs most of a probe's time. Domains with fewer than three held-out clips, or of which the
    probe scores no clip, are left out.
    """
    count = max(config.probe.samples, CLIPS * len(dataset.domains))
    [batch] = fixed_batches(dataset, spread(dataset, count), config, one_shape=True)
    batch = batch.to(device)
    generator = torch.Generator(device).manual_seed(config.train.seed)
    grid = sorted(config.probe.t_grid)
    with probing(backbone), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        cond, _ = backbone.condition(batch)
        targets = pooled_features(teachers, batch, config)
        middle = grid[len(grid) // 2 :][:1]
        inputs = probe_inputs(batch.mel, cond, batch.mask, middle, generator, process=config.flow.process)
        hidden = pooled_hidden(backbone.network, inputs).float()
    scored = {dataset.clips[index].domain for index in spread(dataset, config.probe.samples)}
    stored = []
    for number, domain in enumerate(dataset.domains):
        clips = (batch.domain == number).nonzero().flatten()
        speaks = [name for name, table in domain_tables(config, dataset.domains).items() if table[number]]
        if not speaks or clips.numel() < 3 or domain not in scored:
            continue
        features = targets[speaks[0]][clips].float()
        fitted = torch.arange(clips.numel(), device=device) % 2 == 0
        cosines = lasp(hidden[:, clips], features, fitted)
        cka = linear_cka(hidden[:, clips], features)
        stored.append(Stored(domain, speaks[0], cosines.cpu(), cka.cpu(), int(fitted.sum())))
    return stored
