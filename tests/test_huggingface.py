"""Language models of Hugging Face, tiny and random: generation, its likelihood, and heads."""

import copy
import sys

import numpy as np
import pytest
from oracles import FAILURE_RATE
from scipy import stats

import attnmarkov as am
from attnmarkov.adapters import generate, head_weights
from attnmarkov.dynamics.diagnostics import diagnose

torch = pytest.importorskip("torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

VOCABULARY = 61  # above the 50 likeliest that transformers draw among unless told otherwise
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=40,
        n_embd=24,
        n_layer=2,
        n_head=3,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        initializer_range=0.6,
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        initializer_range=0.4,
    )
    return transformers.LlamaForCausalLM(config).eval()


def log_law(model, history):
    with torch.no_grad():
        logits = model(torch.tensor([history])).logits[0, -1].double().numpy()
    return logits - np.logaddexp.reduce(logits)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_padding_does_not_show(name, penalty, request):
    """The likeliest tokens one by one, prompt by prompt, without cache, batch or padding."""
    model = request.getfixturevalue(name)
    out = generate(model, PROMPTS, 8, do_sample=False, repetition_penalty=penalty)
    assert out.tokens.shape == (3, 8)
    assert out.decoded_log_prob is None
    for row, prompt in enumerate(PROMPTS):
        history = list(prompt)
        for step in range(8):
            law = log_law(model, history)
            with torch.no_grad():
                score = model(torch.tensor([history])).logits[0, -1].double().numpy()
            seen = np.isin(np.arange(VOCABULARY), history)
            score[seen] *= np.where(score[seen] > 0, 1 / penalty, penalty)
            token = int(score.argmax())
            assert out.tokens[row, step] == token
            np.testing.assert_allclose(out.log_prob[row, step], law[token], atol=1e-4)
            history.append(token)
        np.testing.assert_array_equal(out.whole()[row], history)
    np.testing.assert_allclose(out.mean_log_prob, out.log_prob.mean(axis=1))


def test_drawn_from_the_decoded_law(gpt2):
    """Temperature, then top-k, then top-p: the first token's law and both likelihoods."""
    many, prompt = 4000, [7, 8, 8]
    options = {"temperature": 2.5, "top_k": 9, "top_p": 0.85, "repetition_penalty": 1.3}
    out = generate(gpt2, prompt, 1, num_trajectories=many, seed=3, **options)
    own = log_law(gpt2, prompt)
    with torch.no_grad():
        score = gpt2(torch.tensor([prompt])).logits[0, -1].double().numpy()
    seen = np.isin(np.arange(VOCABULARY), prompt)
    score[seen] *= np.where(score[seen] > 0, 1 / 1.3, 1.3)
    order = np.argsort(-score)
    law = np.zeros(VOCABULARY)
    law[order[:9]] = np.exp(score[order[:9]] / 2.5)
    law /= law.sum()
    kept = order[: int((np.cumsum(law[order]) < 0.85).sum()) + 1]
    assert 2 < len(kept) < 9
    law = np.where(np.isin(np.arange(VOCABULARY), kept), law, 0)
    law /= law.sum()
    found = np.bincount(out.tokens[:, 0], minlength=VOCABULARY)
    assert (found[law == 0] == 0).all()
    expected = many * law[kept]
    chi2 = ((found[kept] - expected) ** 2 / expected).sum()
    assert chi2 < stats.chi2.isf(FAILURE_RATE, len(kept) - 1)
    tokens = out.tokens[:, 0]
    np.testing.assert_allclose(out.log_prob[:, 0], own[tokens], atol=1e-4)
    assert out.decoded_log_prob is not None
    np.testing.assert_allclose(out.decoded_log_prob[:, 0], np.log(law[tokens]), atol=1e-4)


def test_likelihood_of_a_penalised_draw_after_padding(gpt2):
    out = generate(gpt2, PROMPTS, 5, repetition_penalty=1.7, seed=2)
    assert out.decoded_log_prob is not None
    for row, prompt in enumerate(PROMPTS):
        history = [*prompt, *out.tokens[row].tolist()]
        for step in range(5):
            seen = history[: len(prompt) + step]
            with torch.no_grad():
                score = gpt2(torch.tensor([seen])).logits[0, -1].double().numpy()
            old = np.unique(seen)
            score[old] *= np.where(score[old] > 0, 1 / 1.7, 1.7)
            law = score - np.logaddexp.reduce(score)
            token = out.tokens[row, step]
            np.testing.assert_allclose(out.decoded_log_prob[row, step], law[token], atol=1e-4)


def test_every_token_can_be_drawn(gpt2):
    out = generate(gpt2, [1], 1, num_trajectories=4000, temperature=1000.0)
    assert len(np.unique(out.tokens)) == VOCABULARY  # each misses with probability exp(-65)


def test_seed_and_settings_of_others(gpt2):
    kept = gpt2.generation_config
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generate(gpt2, PROMPTS, 10, num_trajectories=2, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert gpt2.generation_config is kept
    try:  # a setting of the model that would change everything
        gpt2.generation_config = transformers.GenerationConfig(bad_words_ids=[[0]], top_k=1)
        second = generate(gpt2, PROMPTS, 10, num_trajectories=2, seed=1)
    finally:
        gpt2.generation_config = kept
    np.testing.assert_array_equal(first.tokens, second.tokens)
    other = generate(gpt2, PROMPTS, 10, num_trajectories=2, seed=2)
    assert (first.tokens != other.tokens).any()
    assert first.prompts[:2].tolist() == [PROMPTS[0]] * 2
    assert first.prompt_lengths.tolist() == [5, 5, 2, 2, 4, 4]
    assert len({tuple(row) for row in first.tokens.tolist()}) > 3
    tensors = [torch.tensor(p) for p in PROMPTS]
    again = generate(gpt2, tensors, 10, num_trajectories=2, seed=1)
    np.testing.assert_array_equal(first.tokens, again.tokens)


def test_sequences_that_end(gpt2):
    free = generate(gpt2, PROMPTS, 12, num_trajectories=4, seed=4)
    end = int(np.bincount(free.tokens[:, 2:6].reshape(-1)).argmax())
    kept = gpt2.generation_config
    try:
        gpt2.generation_config = transformers.GenerationConfig(eos_token_id=end)
        out = generate(gpt2, PROMPTS, 12, num_trajectories=4, seed=4)
        same = generate(gpt2, PROMPTS, 12, num_trajectories=4, seed=4, stop=False)
    finally:
        gpt2.generation_config = kept
    np.testing.assert_array_equal(same.tokens, free.tokens)
    assert (same.lengths == 12).all()
    assert out.lengths.min() < out.lengths.max()
    for row, length in enumerate(out.lengths):
        tokens = out.tokens[row, :length].tolist()
        assert end not in tokens[:-1]
        assert tokens[-1] == end or length == 12
        assert np.isfinite(out.log_prob[row, :length]).all()
        assert np.isnan(out.log_prob[row, length:]).all()
        history = [*PROMPTS[row // 4], *tokens]
        expected = [log_law(gpt2, history[:-n])[history[-n]] for n in range(length, 0, -1)]
        np.testing.assert_allclose(out.log_prob[row, :length], expected, atol=1e-4)


def test_diagnoses_and_labels(gpt2):
    out = generate(gpt2, PROMPTS, 20, num_trajectories=3, temperature=0.3, seed=0)
    part = out.diagnose(collapse_window=5)
    expected = diagnose(out.tokens, VOCABULARY, collapse_window=5)
    assert part.num_tokens == VOCABULARY
    np.testing.assert_array_equal(part.distinct, expected.distinct)
    np.testing.assert_array_equal(part.collapse_time, expected.collapse_time)
    whole = out.diagnose(whole=True)
    assert whole.lengths.tolist() == (20 + out.prompt_lengths).tolist()
    data = out.to_dataset()
    np.testing.assert_array_equal(data["log_prob"], out.log_prob)
    assert data["decoded_log_prob"].dims == ("replicate", "step")
    assert repr(out).startswith("Generation(9 sequences of up to 20 tokens from a vocabulary of 61")


def attention_of_last(model, tokens, layer, head):
    """What torch's own attention gives each token of the context together."""
    with torch.no_grad():
        seen = model(torch.tensor([tokens]), output_attentions=True).attentions[layer]
    out = np.zeros(VOCABULARY)
    np.add.at(out, tokens, seen[0, head, -1].numpy())
    return out


def test_head_is_the_models_own(gpt2, llama, key):
    """Without positions, attention of the first layer is that of the CCMC, exactly."""
    gpt2, llama = copy.deepcopy(gpt2), copy.deepcopy(llama)
    tokens = [4, 17, 4, 0, 9, 22, 9, 11]
    torch.manual_seed(2)
    with torch.no_grad():
        gpt2.transformer.wpe.weight.zero_()
        llama.model.rotary_emb.inv_freq.zero_()
        gpt2.transformer.h[0].attn.c_attn.bias.normal_()
        gpt2.transformer.h[0].ln_1.bias.normal_()
    for model, heads in ((gpt2, 3), (llama, 4)):
        for head in range(heads):
            ours = am.CCMC.from_attention_head(*head_weights(model, 0, head))
            theirs = attention_of_last(model, tokens, 0, head)
            np.testing.assert_allclose(ours(tokens), theirs, atol=1e-5)
    ours = am.CCMC.from_attention_head(*head_weights(gpt2, 0, 0))
    traj = am.rollout(ours, key, tokens, 30)
    assert set(np.asarray(traj.tokens)[0].tolist()) <= set(tokens)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_heads_of_later_layers(gpt2, layer_norm):
    block, e = gpt2.transformer.h[1], gpt2.transformer.wte.weight
    with torch.no_grad():
        q, k, _ = block.attn.c_attn(block.ln_1(e) if layer_norm else e).split(24, dim=1)
    scores = (q[:, 8:16] @ k[:, 8:16].T).double().numpy() / np.sqrt(8)
    ours = am.CCMC.from_attention_head(*head_weights(gpt2, 1, 1, layer_norm=layer_norm))
    centred = scores - scores.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(ours.logits, centred, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: prompt 0 is empty"),
        ([[1], []], {}, "prompts: prompt 1 is empty"),
        ([[1, 61]], {}, r"prompts: entry \[0, 1\] is token id 61, outside 0..60"),
        ([[0.5]], {}, "prompts: expected integers"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ([1], {"max_new_tokens": 40}, "1 tokens of the longest prompt and 40 new ones"),
        ([1], {"num_trajectories": 0}, "num_trajectories: must be at least 1"),
        ([1], {"temperature": 0}, "temperature: must be a positive number, got 0"),
        ([1], {"repetition_penalty": -1}, "repetition_penalty: must be a positive number"),
        ([1], {"top_k": 0}, "top_k: must be at least 1"),
        ([1], {"top_p": 1.5}, r"top_p: must lie in \(0, 1\], got 1.5"),
        ([1], {"seed": -1}, "seed: must be at least 0"),
        ([1], {"do_sample": False, "top_k": 3}, "do_sample: temperature, top_k and top_p"),
    ],
)
def test_bad_input(gpt2, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(gpt2, prompts, **{"max_new_tokens": 3, **options})


def test_bad_models(gpt2, llama, monkeypatch):
    for model in (gpt2.transformer, torch.nn.Linear(2, 2), "gpt2"):
        with pytest.raises(TypeError, match="model: expected a transformers model that generates"):
            generate(model, [1], 3)
    gpt2.train()
    with pytest.raises(ValueError, match=r"model: is in train mode.*model.eval\(\)"):
        generate(gpt2, [1], 3)
    gpt2.eval()
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    both = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, **small)
    ).eval()
    with pytest.raises(TypeError, match="T5ForConditionalGeneration has an encoder"):
        generate(both, [1], 3)
    for model in (both, torch.nn.Linear(2, 2), "gpt2"):
        with pytest.raises(TypeError, match="is not of a known kind"):
            head_weights(model, 0, 0)
    with pytest.raises(ValueError, match=r"layer: 2 is outside 0\.\.1"):
        head_weights(gpt2, 2, 0)
    with pytest.raises(ValueError, match=r"head: 4 is outside 0\.\.3"):
        head_weights(llama, 0, 4)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'attnmarkov\[hf\]'"):
        generate(gpt2, [1], 3)
