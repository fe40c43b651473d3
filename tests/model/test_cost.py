"""The cost model against three independent counts: torch's FLOP counter, rows and channels that each linear
layer was really given, and numbers worked out by hand for TinyLlama-1.1B."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hat_lib.backbone.base import load_base
from hat_lib.backbone.shapes import random_config
from hat_lib.config import HatConfig, HatError
from hat_lib.model.cost import ideal_speedup, model_share, state_cost, work
from hat_lib.model.policies import KeepAll, Random
from hat_lib.model.token_state import Masks, TokenState
from hat_lib.model.transformer import HierarchicalTransformer

GRAINS = ("channel", "token")
EXITS = (1, 2, 3)
B, T = 3, 14
PREFILL = 5
LINEAR = ("attention", "ffn", "exited_kv", "head")
aten = torch.ops.aten


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def ids():
    return torch.randint(5, 250, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=GRAINS)
def hat(request):
    return new_hat(request.param)


def new_hat(grain, dtype=torch.float32):
    base = load_base("random:tiny", dtype=dtype, device="cpu")
    return HierarchicalTransformer(base, HatConfig.default(base, granularity=grain, exit_layers=EXITS))


def random_exits(share=0.15, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return Masks({}, {e: torch.rand(B, T, generator=generator) < share for e in EXITS})


def decode(hat, ids, steps, around):
    """One row: prefill, then each step on its own under ``around()``, which yields what it watched."""
    cache, out = DynamicCache(config=hat.lm.config), []
    hat.lm(ids[:1, :PREFILL], cache=cache, use_cache=True)
    for t in range(PREFILL, PREFILL + steps):
        with around() as watched:
            hat.lm(ids[:1, t : t + 1], cache=cache, use_cache=True)
        out.append((watched, hat.trace))
    return out


def count_flops():
    """torch's counter, taught the CPU's own ops; formulas see shapes in place of tensors."""

    def gather(weight, kept, *rest, **kwargs):  # reads ``kept`` rows of ``W^T [C, out]``
        return 2 * kept[0] * weight[1]

    def attention(q, k, v, *rest, **kwargs):  # [B, H, n, h], scores and mixing
        return 2 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]

    formulas = {
        aten._embedding_bag_forward_only: gather,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def split_flops(counter):
    """(linear layers, attention core); exit gates are sums of products, which the counter does not see."""
    counts = counter.get_flop_counts().get("Global", {})
    core = sum(n for op, n in counts.items() if "attention" in str(op) or "bmm" in str(op))
    return sum(counts.values()) - core, core


def flops_of(hat, state, parts):
    flops = state_cost(hat, state).flops
    return round(float(sum(flops[p].sum() for p in parts)))


def translators(hat, state):
    left = int((state.exit_layer < hat.config.n_layers).sum())
    return left * 2 * 2 * hat.config.translator_rank * hat.lm.config.hidden_size


class TestAgainstTheFlopCounter:
    @pytest.mark.parametrize("grain", GRAINS)
    def test_decode_of_one_row(self, grain, ids):
        """Skipping whole FFNs, exits and the attention core: equal to the last FLOP, step by step."""
        hat = new_hat(grain, torch.bfloat16)
        depths = set()
        with hat.force(random_exits()), hat.using(Random(0.6) if grain == "token" else KeepAll()):
            for counter, state in decode(hat, ids, T - PREFILL, count_flops):
                linear, core = split_flops(counter)
                assert linear == flops_of(hat, state, LINEAR) + translators(hat, state)
                depth = int(state.exit_layer)
                assert core == flops_of(hat, state, ("core",)) == 4 * 64 * depth * (state.start + 1)
                depths.add(depth)
        assert len(depths) >= 3, "the steps must leave at several depths"

    def test_token_grain_in_parallel(self, ids):
        """Rows are compacted, so a batch costs what its tokens cost, exits included."""
        hat = new_hat("token")
        with hat.force(random_exits()), hat.using(Random(0.6)), count_flops() as counter:
            hat.lm(ids)
        assert hat.trace.capacity < 0.9 and hat.trace.exit_rate > 0.2
        assert split_flops(counter)[0] == flops_of(hat, hat.trace, LINEAR) + translators(hat, hat.trace)

    def test_channel_grain_in_parallel_runs_masked_dense(self, ids):
        """Channels of several rows are multiplied by zero, not skipped: there the share is no FLOP count."""
        hat = new_hat("channel")
        with hat.using(Random(0.6)), count_flops() as counter:
            hat.lm(ids)
        cost = state_cost(hat, hat.trace)
        assert split_flops(counter)[0] == round(float(cost.dense.sum())) > 1.2 * float(cost.executed.sum())

    def test_channel_exits_in_parallel_are_compacted(self, ids):
        """Whole rows are skipped in a batch too; all channels of the rest are counted, as nothing is gated."""
        hat = new_hat("channel")
        with hat.force(random_exits()), count_flops() as counter:
            hat.lm(ids)
        assert split_flops(counter)[0] == flops_of(hat, hat.trace, LINEAR) + translators(hat, hat.trace)
        assert hat.trace.exit_rate > 0.2


class Products(TorchDispatchMode):
    """Every product with a weight: rows by (where the weight starts, its bytes), and indices of each gather."""

    def __enter__(self):
        self.rows, self.gathers = {}, {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func.overloadpacket
        if op is aten._embedding_bag_forward_only:
            self.gathers.setdefault(args[0].data_ptr(), []).append(args[1].clone())
            key = args[0].data_ptr(), args[0].nbytes
            self.rows[key] = self.rows.get(key, 0) + 1
        elif op in (aten.mm, aten.addmm):
            x, weight = {aten.mm: args[:2], aten.addmm: args[1:3]}[op]
            key = weight.data_ptr(), weight.nbytes
            self.rows[key] = self.rows.get(key, 0) + x.shape[0]
        return func(*args, **(kwargs or {}))


def rows_by_layer(hat, products):
    """Rows that each linear layer was given, ``[{name: rows}]`` by layer; a fused one under each of its names."""
    out = []
    for layer in hat.lm.model.layers:
        rows = {}
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                # A fused product covers the weights of neighbouring modules; a tiled one begins with the first tile.
                start = module.weight.data_ptr()
                rows[name.split(".")[-1]] = sum(
                    n for (first, size), n in products.rows.items() if first <= start < first + size
                )
        out.append(rows)
    return out


class TestWhatEachLayerWasGiven:
    def test_token_grain_runs_the_ffn_on_the_kept_rows(self, ids):
        hat, rows = new_hat("token"), {}
        for i, layer in enumerate(hat.lm.model.layers):
            attention = layer.self_attn
            for name, module in {"mlp": layer.mlp, "q": attention.q_proj, "o": attention.o_proj}.items():
                module.register_forward_hook(
                    lambda m, args, y, k=(i, name): rows.update({k: args[0].shape[:-1].numel()})
                )
        with hat.force(random_exits()), hat.using(Random(0.6)), hat.record():
            hat.lm(ids)
        for i in range(hat.config.n_layers):
            alive = int((hat.trace.exit_layer > i).sum())
            kept = int(hat.trace.masks.keep[i, "ffn"].sum())
            assert rows[i, "mlp"] == kept == round(float(hat.trace.share[i].sum()))
            assert rows[i, "q"] == rows[i, "o"] == alive
        assert rows[3, "mlp"] < rows[3, "q"] < B * T

    def test_an_exited_row_gets_keys_and_values_alone(self, hat, ids):
        with hat.force(random_exits()), Products() as products:
            hat.lm(ids)
        rows, depth = rows_by_layer(hat, products), hat.trace.exit_layer
        assert len(depth.unique()) == 4
        for i in range(hat.config.n_layers):
            alive = int((depth > i).sum())
            for name in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
                assert rows[i][name] == alive, (i, name)
            assert rows[i]["k_proj"] == rows[i]["v_proj"] == B * T

    def test_an_exited_row_in_decode(self, hat, ids):
        """From the exit on: of all products K and V alone, on one row."""
        with hat.force(Masks({}, {2: torch.ones(B, T, dtype=torch.bool)})):
            for products, state in decode(hat, ids, 2, Products):
                assert int(state.exit_layer) == 2
                rows = rows_by_layer(hat, products)
                for i in (2, 3):
                    expected = {name: int(name in ("k_proj", "v_proj")) for name in rows[i]}
                    assert rows[i] == expected


class TestTinyLlamaByHand:
    """22 layers, D 2048, F 5632, 32 heads of 64, 4 K/V heads, vocabulary 32,000."""

    LAYER_ATTENTION = 2048 * (2048 + 2 * 256) + 2048 * 2048
    LAYER_FFN = 3 * 2048 * 5632
    TOTAL = 22 * (LAYER_ATTENTION + LAYER_FFN) + 32000 * 2048

    @pytest.fixture
    def lm_config(self):
        return random_config("random:tinyllama")

    def test_dense_weights(self, lm_config):
        assert self.TOTAL == 1_034_420_224
        cost = work(lm_config, HatConfig.published(lm_config), torch.ones(22, 1), torch.tensor(22), 100)
        assert sum(map(float, cost.dense_weight_bytes.values())) == 2 * self.TOTAL
        assert float(cost.dense) == 2 * self.TOTAL
        assert float(cost.dense_flops["ffn"]) / float(cost.dense) == pytest.approx(0.736, abs=5e-4)
        assert float(cost.dense_flops["attention"]) / float(cost.dense) == pytest.approx(0.20, abs=5e-3)
        assert float(cost.flops["core"]) == float(cost.dense_flops["core"]) == 22 * 2 * (2 * 32 * 64 * 100)

    def test_published_ffn_skipping(self, lm_config):
        published = HatConfig.published(lm_config)
        for capacity, speedup in ((0.9, 1.08), (0.7, 1.28), (0.55, 1.50), (0.4, 1.79)):
            assert ideal_speedup(lm_config, published, capacity) == pytest.approx(speedup, abs=6e-3)

    def test_gating_all_linear_layers(self, lm_config):
        channel = HatConfig.default(lm_config)
        for capacity, speedup in ((0.9, 1.10), (0.75, 1.30), (0.6, 1.60), (0.525, 1.80)):
            assert ideal_speedup(lm_config, channel, capacity) == pytest.approx(speedup, abs=6e-3)

    @pytest.mark.parametrize("grain", GRAINS)
    def test_every_token_leaving(self, grain, lm_config):
        config = HatConfig.default(lm_config, granularity=grain)
        for depth, speedup in ((8, 2.48), (12, 1.74), (16, 1.34), (19, 1.15)):
            share = torch.ones(22, 1 if grain == "token" else 4)
            cost = work(lm_config, config, share, torch.tensor(depth), routed=False)
            body = sum(float(cost.flops[p]) for p in ("attention", "ffn", "head"))
            assert float(cost.dense) / body == pytest.approx(speedup, abs=6e-3)
            assert float(cost.flops["exited_kv"]) == 2 * (22 - depth) * 2048 * 2 * 256
            assert 0.95 < ideal_speedup(lm_config, config, 1.0, depth) / speedup < 1.0
            reached = sum(e <= depth for e in (4, 8, 12, 16, 19))
            assert float(cost.flops["exits"]) == 2 * (reached * 2 * 2048 + 2 * 2 * 2048)
            assert float(cost.weight_bytes["exits"]) == 2 * float(cost.flops["exits"])  # fp32

    def test_routers(self, lm_config):
        exit_layer = torch.tensor([22, 8])
        token = work(lm_config, HatConfig.published(lm_config), torch.ones(22, 1, 2), exit_layer)
        assert token.flops["routers"].tolist() == [2 * 2048 * 21, 2 * 2048 * 7]
        assert token.weight_bytes["routers"].tolist() == [4 * 2048 * 21, 4 * 2048 * 7]
        channel = work(lm_config, HatConfig.default(lm_config), torch.ones(22, 4, 2), exit_layer)
        channels = 3 * 2048 + 5632
        assert channel.flops["routers"].tolist() == [22 * (channels + 2 * 2048), 8 * (channels + 2 * 2048)]
        per_layer = 2 * channels + 4 * 2048
        assert channel.weight_bytes["routers"].tolist() == [22 * per_layer, 8 * per_layer]

    def test_capacity_is_checked(self, lm_config):
        with pytest.raises(HatError, match="capacity"):
            ideal_speedup(lm_config, HatConfig.default(lm_config), 0.01)


class TestStates:
    def test_dense_costs_exactly_one(self, hat, ids):
        hat.lm(ids)
        assert model_share(hat, hat.trace) == 1.0
        cost = state_cost(hat, hat.trace)
        assert not cost.flops["routers"].any() and not cost.flops["exits"].any()

    def test_routers_and_gates_are_charged_while_on_or_where_they_acted(self, hat, ids):
        """A text too short for a skip or an exit still ran them; a state outlives the settings it was made with."""
        with hat.force(Masks()), hat.using(Random(0.6)):
            hat.lm(ids[:, :2])  # protected tokens alone
            cost = state_cost(hat, hat.trace)
            assert hat.trace.capacity == 1.0 and hat.trace.exit_rate == 0.0
        assert cost.flops["routers"].all() and cost.flops["exits"].all() and cost.model_share > 1
        with hat.force(random_exits()), hat.using(Random(0.6)):
            hat.lm(ids)
        cost = state_cost(hat, hat.trace)
        assert cost.flops["routers"].any() and cost.flops["exits"].all()

    def test_model_share_by_hand(self, hat, ids):
        """Head, routers, gates and exited K/V count: the body's share alone would promise more."""
        with hat.force(random_exits()), hat.using(Random(0.6)):
            hat.lm(ids)
        state, d, n = hat.trace, 64, B * T
        body = (64 * (64 + 2 * 32) + 64 * 64) + 3 * 64 * 160
        routable = body if hat.config.granularity == "channel" else 3 * 64 * 160
        ran = state.exit_layer.double()
        weights = float(state.share.double().sum()) * routable + float(ran.sum()) * (body - routable)
        weights += n * 260 * d + float((4 - ran).sum()) * 2 * 32 * d
        reached = sum(int((ran >= e).sum()) for e in EXITS)
        exits = reached * 2 * d + int((ran < 4).sum()) * 2 * 2 * d
        ran_total = float(ran.sum())
        routers = {"channel": ran_total * (5 * 64 + 160), "token": 2 * 64 * (ran_total - n)}
        expected = (2 * weights + routers[hat.config.granularity] + 2 * exits) / (2 * n * (4 * body + 260 * d))
        assert model_share(hat, state) == pytest.approx(expected, rel=1e-6)
        assert state_cost(hat, state).ideal_speedup == pytest.approx(1 / expected, rel=1e-6)

    def test_pads_cost_nothing(self, hat, ids):
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        with hat.using(Random(0.6)):
            hat.lm(ids, attention_mask=mask)
            cost = state_cost(hat, hat.trace)
            for parts in vars(cost).values():
                assert all(not v[0, 9:].any() for v in parts.values())
            assert (cost.executed[mask.bool()] > 0).all()
            hat.lm(ids[:1, :9])
        alone = state_cost(hat, hat.trace)
        assert torch.allclose(alone.executed[0], cost.executed[0, :9])
        assert torch.equal(alone.flops["core"][0], cost.flops["core"][0, :9])

    def test_decode_costs_what_the_parallel_forward_does(self, hat, ids):
        with hat.force(random_exits()), hat.using(Random(0.6)):
            hat.lm(ids[:1])
            parallel = state_cost(hat, hat.trace)
            with hat.collect() as states:
                cache = DynamicCache(config=hat.lm.config)
                for t in range(T):
                    hat.lm(ids[:1, t : t + 1], cache=cache, use_cache=True)
        joined = state_cost(hat, TokenState.cat(states))
        for part, flops in parallel.flops.items():
            assert torch.allclose(joined.flops[part], flops, rtol=1e-6), part

    def test_less_work_costs_less(self, hat, ids):
        shares = []
        for share in (0.9, 0.6, 0.3):
            with hat.using(Random(share)):
                hat.lm(ids)
            shares.append(model_share(hat, hat.trace))
        with hat.force(random_exits()), hat.using(Random(0.3)):
            hat.lm(ids)
        shares.append(model_share(hat, hat.trace))
        assert shares == sorted(shares, reverse=True) and shares[-1] > 0 and shares[0] < 1
