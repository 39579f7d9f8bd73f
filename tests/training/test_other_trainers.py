"""Other people's trainers read the feed: as iterators of `[batch, d_model]` tensors without an end.

SAELens and dictionary_learning are not part of the test environment: their dependencies weigh gigabytes, and what
they pin conflicts with ours. Their tests run where they are installed, in an environment of their own:

    pip install torch==2.13.0 && pip install sae-lens nnsight && pip install --no-deps dictionary-learning
    pip install -e . pytest hypothesis && python -m pytest -s tests/training/test_other_trainers.py
"""

import itertools
import math

import pytest
import torch

import mmcache
from stores_and_processes import without_sync

INSTALL = "pip install it in an environment of its own: see the top of this file"
LAYERS, WIDTH, FEATURES = 3, 32, 48
LAYER, BATCH = 1, 256


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Give a store in which each row is a sum of few of 48 directions, which a dictionary can find."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(LAYERS, FEATURES, WIDTH, generator=generator), dim=-1)
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        path = tmp_path_factory.mktemp("clients") / "acts"
        with mmcache.create(path, sites={"resid_post": WIDTH}, n_layers=LAYERS, dtype=torch.bfloat16) as writer:
            for _ in range(40):
                shape = (LAYERS, 100, FEATURES)
                active = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.06)
                writer.append(torch.arange(100, dtype=torch.int32) + 2, {"resid_post": active @ directions * 8})
    return mmcache.open(path)


def feed(store, **options):
    """The dataset and the adapter, as the README has them."""
    data = mmcache.ActivationDataset(
        store, sites=["resid_post"], layers=[LAYER], batch_size=BATCH, dtype=torch.float32, drop=(), **options
    )
    rows = (batch["resid_post"][:, 0] for _ in itertools.count() for batch in data)
    return data, rows


def unexplained(store, predict):
    """Give the part of the variance of the held-out rows that `predict` leaves, in all dimensions together."""
    held_out = feed(store, split="validation", shuffle=None)[0]
    rows = torch.cat([batch["resid_post"][:, 0] for batch in held_out])
    assert len(rows) == 400
    with torch.no_grad():
        return ((rows - predict(rows)).square().sum() / (rows - rows.mean(dim=0)).square().sum()).item()


def test_the_rows_never_end_and_each_epoch_has_all_of_them(store):
    data, rows = feed(store)
    expected = store["resid_post"].gather(range(store.n_tokens), layers=[LAYER])[:, 0].float()
    steps = math.ceil(store.n_tokens / BATCH)
    orders = []
    for epoch in range(3):
        batches = [next(rows) for _ in range(steps)]
        assert all(batch.dtype == torch.float32 and batch.is_contiguous() for batch in batches)
        assert {tuple(batch.shape[1:]) for batch in batches} == {(WIDTH,)}
        seen = torch.cat(batches)
        orders.append(seen)
        assert torch.equal(seen.unique(dim=0), expected.unique(dim=0))
        assert len(seen) == store.n_tokens
        assert (data.epoch, data.state_dict()["step"]) == (epoch, steps)
    assert not torch.equal(orders[0], orders[1])


def test_a_client_may_write_to_its_rows(store):
    # dictionary_learning divides them in place.
    _, rows = feed(store)
    kept, found = [], []
    for batch in itertools.islice(rows, 40):
        found.append(batch.clone())
        kept.append(batch.div_(7))
    again = [batch.clone() for batch in itertools.islice(feed(store)[1], 40)]
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    assert all(torch.equal(one, two / 7) for one, two in zip(kept, again, strict=True))


@pytest.mark.parametrize("taken", [0, 5, 16, 20])
def test_a_client_that_was_stopped_gets_the_rows_behind(store, taken):
    data, rows = feed(store)
    for _ in range(taken):
        next(rows)
    state = data.state_dict()
    rest = [next(rows).clone() for _ in range(25)]
    other, again = feed(store)
    other.load_state_dict(state)
    assert all(torch.equal(one, next(again)) for one in rest)


class LinearDictionary(torch.nn.Module):
    """The least that is trained like one: an encoder, a ReLU, a decoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(WIDTH, FEATURES), torch.nn.Linear(FEATURES, WIDTH)

    def forward(self, rows):
        return self.decoder(self.encoder(rows).relu())


@pytest.mark.parametrize("how", ["next", "for"])
def test_a_trainer_learns_from_them(store, how):
    # SAELens asks `next(data_provider)` for as many samples as it wants; dictionary_learning breaks its loop off.
    torch.manual_seed(0)
    _, rows = feed(store, split="train", normalize="scalar")
    scale = store["resid_post"].statistics.normalizer("scalar")[1][LAYER].float()
    made = LinearDictionary()
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    before = unexplained(store, lambda raw: made(raw * scale) / scale)
    for step, batch in enumerate(rows if how == "for" else iter(lambda: next(rows), None)):
        if step == 150:
            break
        optimizer.zero_grad()
        (made(batch) - batch).square().mean().backward()
        optimizer.step()
    assert unexplained(store, lambda raw: made(raw * scale) / scale) < 0.1 < before


@pytest.mark.filterwarnings("ignore")  # what it imports warns of its own affairs
def test_saelens_trains_on_it(store, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason=INSTALL)
    config = pytest.importorskip("sae_lens.config", reason=INSTALL)
    torch.manual_seed(0)
    data, rows = feed(store, split="train")
    sae = sae_lens.TopKTrainingSAE(
        sae_lens.TopKTrainingSAEConfig(
            d_in=WIDTH, d_sae=2 * FEATURES, k=4, normalize_activations="expected_average_only_in"
        )
    )
    trainer = sae_lens.SAETrainer(
        cfg=config.SAETrainerConfig(
            total_training_samples=300 * BATCH,
            train_batch_size_samples=BATCH,
            lr=3e-3,
            lr_end=3e-4,
            n_batches_for_norm_estimate=20,
            checkpoint_path=str(tmp_path),
            save_final_checkpoint=True,
        ),
        sae=sae,
        data_provider=rows,
    )
    before = unexplained(store, sae)
    trained = trainer.fit()
    after = unexplained(store, trained.eval())
    print(f"SAELens {sae_lens.__version__}: unexplained variance {before:.4f} -> {after:.4f}")  # noqa: T201
    assert after < 0.2 < before
    assert trainer.n_training_samples >= 300 * BATCH
    # 3,600 tokens an epoch: it went through many, and where it is, is known.
    assert data.epoch >= 20
    saved = sae_lens.SAE.load_from_disk(str(next(tmp_path.glob("final_*"))))
    assert unexplained(store, saved) == pytest.approx(after, rel=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normalize", [False, True])
def test_dictionary_learning_trains_on_it(store, tmp_path, normalize):
    training = pytest.importorskip("dictionary_learning.training", reason=INSTALL)
    top_k = pytest.importorskip("dictionary_learning.trainers.top_k", reason=INSTALL)
    data, rows = feed(store, split="train")
    config = {
        "trainer": top_k.TopKTrainer,
        "steps": 400,
        "activation_dim": WIDTH,
        "dict_size": 2 * FEATURES,
        "k": 4,
        "layer": LAYER,
        "lm_name": "none",
        "lr": 3e-3,
        "warmup_steps": 20,
        "seed": 0,
        "device": "cpu",
    }
    fresh = top_k.TopKTrainer(**{name: value for name, value in config.items() if name != "trainer"}).ae
    before = unexplained(store, fresh)
    training.trainSAE(rows, [config], steps=400, save_dir=str(tmp_path), normalize_activations=normalize, device="cpu")
    trained = top_k.AutoEncoderTopK(WIDTH, 2 * FEATURES, 4)
    trained.load_state_dict(torch.load(tmp_path / "trainer_0" / "ae.pt", weights_only=True))
    after = unexplained(store, trained)
    print(f"dictionary_learning, normalize {normalize}: unexplained variance {before:.4f} -> {after:.4f}")  # noqa: T201
    assert after < 0.2 < before
    assert data.epoch >= 20
