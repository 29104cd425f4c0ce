"""What trains, the schedule, the optimizer, accumulation and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from tora_jax.configs import common

from tora_jax import sharding
from tora_jax.backbones import assembly, opensora
from tora_jax.backbones.opensora import BUFFERS
from tora_jax.errors import UserError
from tora_jax.training import optim

CONFIG = {
    "optimizer": "adamw",
    "lr": 1e-2,
    "warmup": 3,
    "decay": "constant",
    "final": 0.1,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-15,
    "muon_rms": 0.5,
    "muon_kernels": (".*/kernel",),
    "clip": 1.0,
    "weight_decay": (),
    "lr_multipliers": (),
}
TREE = {
    "tora": {
        "stdit": {"null_caption": jnp.ones(3), "blocks": {"spatial": {"kernel": jnp.ones((2, 2))}}},
        "extractor": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.zeros(3)},
    },
    "vae": {"shift": jnp.zeros(4), "scale": jnp.ones(4), "conv": {"scale": jnp.ones(2)}},
}


def trained_paths(patterns):
    return {path for path, chosen in optim.select(TREE, patterns, BUFFERS).items() if chosen}


class TestSelection:
    def test_first_match_wins(self):
        assert trained_paths(["tora/extractor/.*"]) == {"tora/extractor/kernel", "tora/extractor/bias"}
        assert trained_paths(["!.*/bias", "tora/extractor/.*"]) == {"tora/extractor/kernel"}
        assert trained_paths(["tora/extractor/kernel", "!tora/extractor/.*", "tora/.*"]) == {
            "tora/extractor/kernel",
            "tora/stdit/blocks/spatial/kernel",
        }

    def test_patterns_may_overlap_where_they_agree(self):
        assert trained_paths(["tora/.*", "tora/extractor/.*"]) == trained_paths(["tora/.*"])

    def test_buffers_never_train(self):
        everything = trained_paths([".*"])
        assert {"vae/conv/scale", "tora/stdit/blocks/spatial/kernel"} < everything
        assert not everything & {"tora/stdit/null_caption", "vae/shift", "vae/scale"}
        assert "tora/stdit/null_caption" in optim.select(TREE, [".*"], BUFFERS)

    @pytest.mark.parametrize(
        ("patterns", "message"),
        [
            (["extractor/.*"], "extractor/"),  # patterns match whole paths
            (["tora/.*", "!tora/extractor/.*"], "before it"),
            (["vae/shift"], "vae/shift"),
            (["tora/("], "no regular expression"),
            (["!tora/.*"], "nothing to train"),
            ([], "nothing to train"),
        ],
    )
    def test_mistakes(self, patterns, message):
        with pytest.raises(UserError, match="train: .*" + message.replace("(", r"\(")):
            optim.split(TREE, patterns, BUFFERS)

    def test_split_and_join(self):
        trained, frozen = optim.split(TREE, ["tora/extractor/.*"])
        assert set(trained) == {"tora/extractor/kernel", "tora/extractor/bias"}
        joined = optim.join(trained, frozen)
        flat, want = (traverse_util.flatten_dict(tree) for tree in (joined, TREE))
        assert flat.keys() == want.keys()
        assert all(flat[path] is want[path] for path in want)

    def test_buffers_of_the_whole_chain(self, tiny_config):
        parts = assembly.modules(tiny_config)
        shapes = jax.eval_shape(lambda key: assembly.init_params(opensora, parts, key), jax.random.key(0))
        frozen = {path for path, chosen in optim.select(shapes, [".*"], BUFFERS).items() if not chosen}
        assert frozen == {
            "tora/stdit/null_caption",
            *(f"{part}/{name}" for part in ("vae", "motion_vae") for name in ("shift", "scale")),
        }


class TestSchedule:
    def test_warm_up_of_the_reference(self):
        rate = optim.schedule({**CONFIG, "warmup": 1000, "lr": 1e-4}, 10_000)
        for step in (0, 1, 499, 999):
            np.testing.assert_allclose(rate(step), 1e-4 * (step + 1) / 1001, rtol=1e-6)
        for step in (1000, 5000, 20_000):
            np.testing.assert_allclose(rate(step), 1e-4, rtol=1e-6)

    def test_cosine(self):
        rate = optim.schedule({**CONFIG, "decay": "cosine", "warmup": 100}, 1100)
        want = {
            0: 1e-2 / 101,
            100: 1e-2,
            350: 1e-2 * (0.1 + 0.9 * (2 + 2**0.5) / 4),
            600: 5.5e-3,
            1100: 1e-3,
            9999: 1e-3,
        }
        for step, value in want.items():
            np.testing.assert_allclose(rate(step), value, rtol=1e-5)

    def test_without_warm_up(self):
        rate = optim.schedule({**CONFIG, "warmup": 0, "decay": "cosine"}, 1)
        np.testing.assert_allclose(rate(0), 1e-2, rtol=1e-6)

    def test_unknown(self):
        with pytest.raises(UserError, match="constant or cosine"):
            optim.schedule({**CONFIG, "decay": "linear"}, 10)


def run(config, gradients, trained=None, steps=10):
    trained = {"a/kernel": jnp.array([1.0, -2.0]), "a/bias": jnp.array([0.5])} if trained is None else trained
    transform = optim.make(config, trained, steps)
    state = transform.init(trained)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)
    return trained, state


GRADIENT = {"a/kernel": jnp.array([0.3, -0.4]), "a/bias": jnp.array([0.0])}


class TestOptimizer:
    def test_adamw_by_hand(self):
        """Three steps against Adam's formulas, warm-up and decoupled decay of the kernel included."""
        config = {**CONFIG, "weight_decay": ((".*/kernel", 0.1),)}
        gradients = [{k: g * scale for k, g in GRADIENT.items()} for scale in (1.0, -0.5, 0.25)]
        got, _ = run(config, gradients)
        value, m, v = np.array([1.0, -2.0]), 0.0, 0.0
        for k, gradient in enumerate(gradients):
            g = np.array(gradient["a/kernel"], np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            update = (m / (1 - 0.9 ** (k + 1))) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-15)
            value = value - 1e-2 * (k + 1) / 4 * (update + 0.1 * value)
        np.testing.assert_allclose(got["a/kernel"], value, rtol=1e-5)
        np.testing.assert_array_equal(got["a/bias"], [0.5])  # neither gradient nor decay

    def test_sgd_is_plain(self):
        got, state = run({**CONFIG, "optimizer": "sgd", "warmup": 0, "clip": 0.0}, [GRADIENT])
        np.testing.assert_allclose(got["a/kernel"], [1.0 - 3e-3, -2.0 + 4e-3], rtol=1e-6)
        assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) == 1  # the step

    def test_muon_steps_along_the_polar_factor(self):
        """The first step of a kernel: all singular values about alike, whatever the gradient's were; one of a bias."""
        gradient = np.random.default_rng(0).normal(size=(6, 4)) * [1, 3, 10, 30]
        got = self.muon({"a/kernel": gradient, "a/bias": np.array([1e-3, -5.0])})
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        step = -got["a/kernel"] / (1e-2 * 0.5 * 6**0.5)  # a rate of 1e-2 and, for a square matrix, an RMS of 0.5
        np.testing.assert_allclose(np.diag(u.T @ step @ v.T), np.ones(4), atol=0.35)  # Newton and Schulz's 5 rounds
        np.testing.assert_allclose(u.T @ step @ v.T * (1 - np.eye(4)), np.zeros((4, 4)), atol=1e-3)
        np.testing.assert_allclose(got["a/bias"], 1e-2 * (1 + 0.9 / 1.9) * np.array([-1, 1]), rtol=1e-4)  # NAdam's

    def test_muon_on_stacked_and_convolution_kernels(self):
        """Each layer of a stack and a flattened convolution go as matrices of their own do."""
        gradient = np.random.default_rng(1).normal(size=(3, 12, 5))
        alone = [self.muon({"a/kernel": layer})["a/kernel"] for layer in gradient]
        stacked = self.muon({"a/blocks/b/kernel": gradient})["a/blocks/b/kernel"]
        np.testing.assert_allclose(stacked, alone, rtol=1e-4, atol=1e-7)
        convolution = self.muon({"a/kernel": gradient[0].reshape(2, 3, 2, 5)})["a/kernel"]
        np.testing.assert_allclose(convolution.reshape(12, 5), alone[0], rtol=1e-4, atol=1e-7)

    def test_muon_of_some_kernels(self):
        """The others move as by Adam: each number by about the rate, in the direction of its sign."""
        gradient = {"a/conv_out/kernel": np.array([[1e-3, -5.0]] * 2), "a/conv/kernel": np.eye(2)}
        got = self.muon(gradient, muon_kernels=("!.*/conv_out/kernel", ".*/kernel"))
        adam = np.array([[-1, 1]] * 2) * 1e-2 * (1 + 0.9 / 1.9)
        np.testing.assert_allclose(got["a/conv_out/kernel"], adam, rtol=1e-4)
        np.testing.assert_array_equal(got["a/conv/kernel"], self.muon(gradient)["a/conv/kernel"])
        with pytest.raises(UserError, match=r"muon_kernels: 'b/\.\*' fits no parameter"):
            self.muon(gradient, muon_kernels=("b/.*",))

    def test_muon_on_a_mesh(self):
        """Momenta lie where their kernels do, and the step is that of one device."""
        paths = ("tora/stdit/blocks/spatial/mlp/fc1/kernel", "tora/stdit/t_block/kernel", "tora/stdit/t_block/bias")
        shapes = dict(zip(paths, ((3, 8, 16), (16, 8), (8,)), strict=True))
        rng = np.random.default_rng(2)
        gradient = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
        mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
        transform = optim.make({**CONFIG, "optimizer": "muon"}, gradient, 10)
        want, _ = jax.jit(transform.update)(gradient, transform.init(gradient), gradient)

        def put(tree):
            return jax.device_put(tree, sharding.param_shardings(tree, mesh, tuple(common.training()["rules"].items())))

        placed = put(gradient)
        state = put(transform.init(gradient))
        momenta = [
            (path[-1].key, leaf.sharding)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if isinstance(path[-1], jax.tree_util.DictKey) and path[-1].key in paths
        ]
        assert len(momenta) == 4  # one of each kernel, two of the bias
        assert all(where == placed[path].sharding for path, where in momenta)
        assert not placed[paths[0]].sharding.is_fully_replicated
        got, _ = jax.jit(transform.update)(placed, state, placed)
        for path in paths:
            np.testing.assert_allclose(got[path], want[path], rtol=1e-3, atol=1e-6)

    @staticmethod
    def muon(gradient, **changes):
        """What the first step adds to zeros."""
        config = {**CONFIG, "optimizer": "muon", "warmup": 0, "clip": 0.0, **changes}
        gradient = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in gradient.items()}
        return run(config, [gradient], {path: jnp.zeros(leaf.shape) for path, leaf in gradient.items()})[0]

    @pytest.mark.parametrize(("clip", "share"), [(0.25, 0.5), (1.0, 1.0), (0.0, 1.0)])
    def test_clip_by_global_norm(self, clip, share):
        got, _ = run({**CONFIG, "optimizer": "sgd", "warmup": 0, "clip": clip}, [GRADIENT])  # of norm 0.5
        np.testing.assert_allclose(got["a/kernel"], np.array([1.0 - 3e-3 * share, -2.0 + 4e-3 * share]), rtol=1e-6)

    def test_multipliers(self):
        config = {**CONFIG, "warmup": 0, "lr_multipliers": ((".*/bias", 0.0), ("a/.*", 3.0))}
        got, _ = run(config, [{"a/kernel": jnp.ones(2), "a/bias": jnp.ones(1)}])
        np.testing.assert_allclose(got["a/kernel"], [1.0 - 3e-2, -2.0 - 3e-2], rtol=1e-5)
        np.testing.assert_array_equal(got["a/bias"], [0.5])

    @pytest.mark.parametrize(
        "wrong",
        [
            {"optimizer": "lion"},
            {"weight_decay": (("b/.*", 0.1),)},
            {"lr_multipliers": (("a/.*", 2.0), ("a/kernel", 3.0))},
        ],
    )
    def test_mistakes(self, wrong):
        with pytest.raises(UserError, match=next(iter(wrong))):
            run({**CONFIG, **wrong}, [])

    def test_frozen_leaves_keep_every_bit(self):
        """20 steps of a model in which all leaves have a gradient; state and average exist for the trained alone."""
        keys = jax.random.split(jax.random.key(0), 3)
        params = {
            "one": {"kernel": jax.random.normal(keys[0], (4, 8))},
            "two": {"kernel": jax.random.normal(keys[1], (8, 2))},
        }
        x = jax.random.normal(keys[2], (5, 4))
        trained, frozen = optim.split(params, ["two/.*"])
        before = jax.tree.map(np.array, frozen)
        transform = optim.make(CONFIG, trained, 20)
        state, ema = transform.init(trained), optim.ema_init(trained)

        def loss(trained, frozen):
            p = optim.join(trained, frozen)
            return jnp.square(jnp.tanh(x @ p["one"]["kernel"]) @ p["two"]["kernel"] - 1).mean()

        @jax.jit
        def step(trained, frozen, state, ema):
            value, gradient = jax.value_and_grad(loss)(trained, frozen)
            updates, state = transform.update(gradient, state, trained)
            trained = optax.apply_updates(trained, updates)
            return value, trained, state, optim.ema_update(ema, trained, 0.9)

        losses = []
        for _ in range(20):
            value, trained, state, ema = step(trained, frozen, state, ema)
            losses.append(float(value))
        assert losses[-1] < 0.9 * losses[0]
        np.testing.assert_array_equal(frozen["one/kernel"], before["one/kernel"])
        assert trained.keys() == ema.keys() == {"two/kernel"}
        assert all(leaf.shape in ((), (8, 2)) for leaf in jax.tree.leaves(state))


class TestAccumulation:
    def test_equals_the_big_batch(self):
        kernel = jax.random.normal(jax.random.key(0), (3, 2))
        batch = {"x": jax.random.normal(jax.random.key(1), (12, 3)), "key": jax.random.split(jax.random.key(2), 12)}

        def loss(kernel, batch):
            noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(batch["key"])
            value = jnp.square(jnp.tanh(batch["x"] @ kernel) - noise)
            return value.mean(), {"largest": value.max(1).mean()}

        def function(batch):
            return jax.value_and_grad(loss, has_aux=True)(kernel, batch)

        want = function(batch)
        for parts in (1, 2, 3, 12):
            got = jax.jit(lambda batch, n=parts: optim.accumulate(function, batch, n))(batch)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), got, want)

    def test_parts_keep_samples_on_their_devices(self):
        mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
        batch = jax.device_put(
            np.arange(64.0).reshape(32, 2), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        )
        mean = jax.jit(lambda batch: optim.accumulate(lambda x: jnp.square(x).mean(0), batch, 4))
        compiled = mean.lower(batch).compile()
        np.testing.assert_allclose(compiled(batch), np.square(np.asarray(batch)).mean(0), rtol=1e-6)
        assert not any(name in compiled.as_text() for name in ("all-to-all", "all-gather", "collective-permute"))

    def test_uneven(self):
        with pytest.raises(UserError, match=r"batch of 10 .* 4 equal parts"):
            optim.accumulate(lambda x: x.mean(), jnp.zeros((10, 2)), 4)


def test_moving_average():
    trained = {"a": jnp.array([1.0, 2.0], jnp.bfloat16)}
    ema = optim.ema_init(trained)
    assert ema["a"].dtype == jnp.float32
    for value in (3.0, 5.0):
        ema = optim.ema_update(ema, {"a": jnp.full(2, value, jnp.bfloat16)}, 0.9)
    assert ema["a"].dtype == jnp.float32
    np.testing.assert_allclose(ema["a"], [(0.9 + 0.3) * 0.9 + 0.5, (1.8 + 0.3) * 0.9 + 0.5], rtol=1e-6)
