"""Scoring results compared with those of transformers for the same weights."""

import numpy as np
import pytest
import torch

from keras_gemma import scoring
from keras_gemma.causal_lm.model import GemmaCausalLM
from tests.configurations import CONFIGURATIONS
from tests.parity.pairs import make_ours, make_theirs
from tests.scoring.texts import close

IDS = np.array([2, 9, 31, 8, 300, 77, 5, 140, 11, 12, 250], "int32")
OTHER = np.array([2, 9, 31, 8, 301, 77, 5, 140, 11, 12, 250], "int32")
ANSWER = 40


@pytest.fixture(scope="module", params=["gemma1_multi_head", "gemma2_grouped"])
def configuration(request):
    return CONFIGURATIONS[request.param]


@pytest.fixture(scope="module")
def ours(configuration):
    return GemmaCausalLM(make_ours(configuration))


@pytest.fixture(scope="module")
def theirs(configuration):
    return make_theirs(configuration)


def tensor(ids):
    return torch.from_numpy(np.asarray(ids, "int64"))[None]


def log_probability(logits):
    return logits[..., -1, :].log_softmax(-1)[..., ANSWER]


def test_logit_lens(configuration, ours, theirs):
    """The last hidden state of transformers is already normalized."""
    cap = configuration.get("final_logit_soft_cap")
    with torch.no_grad():
        states = theirs(tensor(IDS), output_hidden_states=True).hidden_states
        normalized = [*(theirs.model.norm(state) for state in states[:-1]), states[-1]]
        logits = torch.cat([theirs.lm_head(state) for state in normalized])
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        log_probabilities = logits.log_softmax(-1)
    lens = scoring.logit_lens(ours, IDS)
    assert lens.predictions == [
        [str(i) for i in row] for row in log_probabilities.argmax(-1).tolist()
    ]
    np.testing.assert_allclose(lens.probabilities, log_probabilities.max(-1)[0].exp(), atol=1e-4)
    follows = tensor(IDS)[:, 1:, None].expand(len(states), -1, 1)
    close(lens.losses, -log_probabilities[:, :-1].gather(-1, follows)[..., 0].numpy())


def test_attention_maps(ours, theirs):
    with torch.no_grad():
        attentions = theirs(tensor(IDS), output_attentions=True).attentions
    for layer, expected in enumerate(attentions):
        weights = scoring.attention_maps(ours, IDS, layer).weights
        np.testing.assert_allclose(weights, expected[0], atol=1e-4)


def test_patching(ours, theirs):
    """Uses one PyTorch forward hook for each block and position."""
    grid = scoring.activation_patching(ours, IDS, OTHER, ANSWER)
    layers = theirs.model.layers
    expected = np.zeros(grid.scores.shape)
    with torch.no_grad():
        clean = theirs(tensor(IDS), output_hidden_states=True)
        assert grid.clean == pytest.approx(log_probability(clean.logits).item(), abs=1e-3)
        for layer, block in enumerate(layers):
            outputs = []
            recorder = block.register_forward_hook(lambda _, args, y, outs=outputs: outs.append(y))
            theirs(tensor(IDS))
            recorder.remove()
            for position in range(len(IDS)):

                def patch(module, args, y, clean=outputs, position=position):
                    y = y.clone()
                    y[:, position] = clean[0][:, position]
                    return y

                hook = block.register_forward_hook(patch)
                expected[layer, position] = log_probability(theirs(tensor(OTHER)).logits).item()
                hook.remove()
    np.testing.assert_allclose(grid.scores, expected, atol=1e-3)


def gradients(theirs, embeddings):
    """Returns the gradients of the log-probability, `[B, T, D]`, and its values `[B]`."""
    embeddings = embeddings.detach().requires_grad_()
    values = log_probability(theirs(inputs_embeds=embeddings).logits)
    return torch.autograd.grad(values.sum(), embeddings)[0], values.detach()


def test_gradient_times_input(ours, theirs):
    embeddings = theirs.get_input_embeddings()(tensor(IDS))
    slope, value = gradients(theirs, embeddings)
    shares = scoring.gradient_times_input(ours, IDS, ANSWER)
    close(shares.scores, (slope * embeddings).sum(-1)[0].detach().numpy())
    assert shares.log_probability == pytest.approx(value.item(), abs=1e-3)


def test_integrated_gradients(ours, theirs):
    steps = 20  # more than one batch
    with torch.no_grad():
        end = theirs.get_input_embeddings()(tensor(IDS))
        start = theirs.get_input_embeddings()(tensor(np.where(IDS == 2, 2, 7)))
    fractions = (torch.arange(steps)[:, None, None] + 0.5) / steps
    slopes, _ = gradients(theirs, start + fractions * (end - start))
    expected = (slopes.mean(0) * (end - start)[0]).sum(-1).numpy()
    shares = scoring.integrated_gradients(ours, IDS, ANSWER, steps=steps, baseline=7)
    close(shares.scores, expected)
    _, value = gradients(theirs, start)
    assert shares.baseline == pytest.approx(value.item(), abs=1e-3)


@pytest.mark.parametrize(("stride", "window"), [(3, 8), (4, 100)])
def test_perplexity(ours, theirs, stride, window):
    """Uses the loop of the transformers documentation: tokens of the previous window do not count.

    The model ignores labels of -100 and shifts labels by one.
    """
    ids = np.random.default_rng(0).integers(3, 512, 20)
    losses, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = tensor(ids[begin:end]).clone()
        labels[:, : before - begin] = -100
        counted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            mean = theirs(tensor(ids[begin:end]), labels=labels).loss.item()
        losses.append((mean * counted, counted))
        before = end
        if end == len(ids):
            break
    total, counted = np.sum(losses, axis=0)
    assert counted == len(ids) - 1
    actual = ours.perplexity([ids], stride=stride, window=window)[0]
    assert actual == pytest.approx(np.exp(total / counted), rel=1e-4)
