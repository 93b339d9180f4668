import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnerd import layers, plain
from pixnerd.layers import Attention, OutputLinear, SwiGLU, TimeEmbedding, hidden_padding, rotary_table, rotate

from .conftest import randomised

CPU = torch.device("cpu")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([4, 8, 12]))
def test_rotation_is_the_complex_product(rows, columns, head_dim):
    x = torch.randn(2, 3, rows * columns, head_dim)
    turned = rotate(x, *rotary_table(rows, columns, (16, 16), head_dim, torch.float32, CPU))
    torch.testing.assert_close(turned, plain.rotate(x, rows, columns), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rotary_scores_depend_on_the_offset_alone():
    cos, sin = rotary_table(5, 5, (16, 16), 8, torch.float32, CPU)
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rotate(y.expand(1, 1, 25, 8), cos, sin)[0, 0] for y in (q, k))
    scores = (turned_q @ turned_k.T).reshape(5, 5, 5, 5)  # query row, query column, key row, key column
    torch.testing.assert_close(scores[0, 1, 2, 0], scores[2, 3, 4, 2])
    torch.testing.assert_close(scores[3, 0, 1, 4], scores[4, 0, 2, 4])
    assert not torch.isclose(scores[0, 1, 2, 0], scores[0, 1, 0, 2])  # rows and columns are told apart


def test_finer_grid_interpolates_positions():
    coarse, _ = rotary_table(3, 3, (16, 16), 4, torch.float32, CPU)
    fine, _ = rotary_table(5, 5, (16, 16), 4, torch.float32, CPU)
    torch.testing.assert_close(fine.reshape(5, 5, 2)[::2, ::2], coarse.reshape(3, 3, 2))


def test_bfloat16_attention_stays_close():
    attention = randomised(Attention(16, 2))
    x = torch.randn(2, 9, 16)
    rotary = rotary_table(3, 3, (16, 16), 8, torch.float32, CPU)
    exact = attention(x, rotary)
    with torch.autocast("cpu", torch.bfloat16):
        rough = attention(x, rotary)
    assert rough.dtype == torch.bfloat16
    assert 0 < (rough - exact).norm() / exact.norm() < 0.03


def test_a_padded_hidden_axis_computes_the_same(monkeypatch):
    """As on a GPU: 21 hidden numbers become 24; values, gradients and the weights' names and shapes stay."""
    assert [hidden_padding(n, torch.device("cuda")) for n in (2730, 3072, 1)] == [6, 0, 7]
    assert hidden_padding(2730, CPU) == 0
    network, x = randomised(SwiGLU(16, 21)).double(), torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    names = {name: weight.shape for name, weight in network.state_dict().items()}
    found = []
    for added in (0, 3):
        monkeypatch.setattr(layers, "hidden_padding", lambda hidden, device, added=added: added)
        y = network(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *network.parameters()))))
    for plain_values, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain_values, rtol=1e-12, atol=1e-12)
    assert names == {"gate_value.weight": (42, 16), "out.weight": (16, 21)}
    assert names == {name: weight.shape for name, weight in network.state_dict().items()}


def test_last_layer_rounds_no_sample_to_bfloat16():
    layer = randomised(OutputLinear(16, 3))
    x = torch.randn(50, 16).bfloat16()  # what the layer before it gives under autocast
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), exact.float(), atol=1e-5, rtol=1e-5)
        assert layer(x).dtype == torch.bfloat16  # while training, where it would keep a float32 copy of its input
    with torch.no_grad():
        assert layer.bfloat16()(x).dtype == torch.bfloat16  # a network that was converted as a whole


def test_time_embedding_reads_unscaled_time():
    embed = randomised(TimeEmbedding(6))
    weights = {f"time_embed.{name}": parameter for name, parameter in embed.named_parameters()}
    t = torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(embed(t), plain.time_vector(weights, t), atol=1e-5, rtol=1e-5)
