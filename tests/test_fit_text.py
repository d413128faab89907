"""The ``fit-text`` report: its baselines, its bookkeeping, and the command on real text."""

from __future__ import annotations

import json

import numpy as np
import pytest

import attnmarkov as am
from attnmarkov import data
from attnmarkov.experiments import _text_facts as facts
from attnmarkov.experiments import _text_models as models
from attnmarkov.experiments import fit_text
from attnmarkov.experiments._text_report import render, verdict
from attnmarkov.experiments.fit_text import FitText, analyse
from attnmarkov.prompts.text import Vocabulary, windows

TOKENS = np.array([0, 1, 1, 0, 1, 2])  # pairs 01 11 10 01 12


def _one_window(tokens, size, following):
    """A single position, by hand."""
    prompts, _ = windows([*tokens, 0], len(tokens), size)
    counts = np.asarray(prompts.counts)
    inside = counts[np.arange(1), [following]] > 0
    return models.Positions(prompts, counts, tokens[-1:], np.array([following]), inside)


@pytest.fixture(scope="module")
def model():
    p = np.random.default_rng(0).dirichlet(np.ones(3), 3)
    return am.CCMC.from_transition_matrix(p / p.sum(1, keepdims=True))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Two alternating rhymes with noise: 'q' is always followed by 'u', 'z' comes once."""
    rng = np.random.default_rng(1)
    words = ["quail", "quilt", "lamb", "milk", "bull", "baa"]
    text = " ".join(words[i] for i in rng.integers(0, len(words), 700)) + "."
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("z" + text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def results(text_file):
    return analyse(FitText(text_file, window=40, generate=300))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Results on 900 words out of 15, all of them in both parts."""
    words = [f"w{chr(97 + i)}" for i in range(15)]
    text = " ".join(words[i] for i in np.random.default_rng(5).integers(0, 15, 900))
    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text(text, encoding="utf-8")
    return analyse(FitText(path, level="word", prior=1.0, generate=200))


def test_unigram_and_bigram_by_hand():
    np.testing.assert_allclose(models.unigram(TOKENS, 3, 1.0), [3 / 9, 4 / 9, 2 / 9])
    np.testing.assert_array_equal(models.pair_counts(TOKENS, 3), [[0, 2, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_allclose(
        models.bigram(TOKENS, 3, 0.5),
        [[0.5 / 3.5, 2.5 / 3.5, 0.5 / 3.5], [1 / 3, 1 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3]],
    )


def test_interpolation_by_hand():
    base = np.array([2.5, 3.5, 1.5]) / 7.5
    law = models.interpolated(TOKENS, 3, beta=2.0)
    np.testing.assert_allclose(law[0], 0.5 * np.array([0, 1, 0]) + 0.5 * base)
    np.testing.assert_allclose(law[1], 0.6 * np.full(3, 1 / 3) + 0.4 * base)
    np.testing.assert_allclose(law[2], base)  # never followed by anything


@pytest.mark.parametrize("independent", [True, False])
def test_settings_are_those_that_the_validation_part_likes_best(independent):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 3, 700) if independent else np.arange(700) % 3
    tokens, other = tokens[:400], tokens[400:]
    at = models.positions(other, 4, 3)
    chosen = models.tune(tokens, 3, at)

    def value(law):
        return np.log(law[at.last, at.following]).mean()

    values = {d: value(models.bigram(tokens, 3, d)) for d in models.DELTAS}
    assert values[chosen.delta] == max(values.values())
    values = {b: value(models.interpolated(tokens, 3, b)) for b in models.BETAS}
    assert values[chosen.beta] == max(values.values())
    if independent:
        assert chosen.beta >= 100  # the unigram law is right
    else:
        assert chosen.beta == models.BETAS[0]
        assert chosen.delta == models.DELTAS[0]


def test_escape_rate_is_the_share_of_misses_among_windows_that_can_miss():
    at = models.positions(np.array([0, 1, 2, 0, 0, 0, 1]), 3, 3)
    # windows 012 (whole vocabulary), 120 (whole), 200 -> 0 in, 000 -> 1 out
    assert models.escape_rate(at) == pytest.approx((1 + 0.5) / (2 + 1))


@pytest.mark.parametrize("tokens", [[0, 0, 1], [2, 2, 2], [0, 2, 1]])
def test_models_with_escape_sum_to_one(model, tokens):
    base = np.array([0.5, 0.2, 0.3])
    total = 0.0
    for following in range(3):
        at = _one_window(np.array(tokens), 3, following)
        log_prob = np.asarray(model.log_prob(at.prompts, at.following), np.float64)
        with np.errstate(divide="ignore"):
            total += np.exp(models.with_escape(log_prob, at, base, 0.2))[0]
    assert total == pytest.approx(1, abs=1e-6)


def test_escape_by_hand():
    base = np.array([0.5, 0.2, 0.3])
    at = _one_window(np.array([0, 0]), 3, 2)
    value = models.with_escape(np.array([-np.inf]), at, base, 0.2)
    np.testing.assert_allclose(np.exp(value), 0.2 * 0.3 / 0.5)
    at = _one_window(np.array([0, 0]), 3, 0)
    np.testing.assert_allclose(np.exp(models.with_escape(np.zeros(1), at, base, 0.2)), 0.8)


def test_scores_restrict_every_model_to_the_window(model):
    laws = models.learn(TOKENS, 3, models.Settings(0.5, 2.0, 0.2))
    at = _one_window(np.array([0, 0, 1]), 3, 0)
    inside, everywhere = models.scores(model, at, laws)
    u, b = laws.unigram, laws.bigram[1]
    expected = {
        "CCMC": np.asarray(model.next_token_probs([2, 1, 0], 1))[0],
        "window's own frequencies": 2 / 3,
        "unigram among the window's tokens": u[0] / (u[0] + u[1]),
        "bigram among the window's tokens": b[0] / (b[0] + b[1]),
        "unigram": u[0],
        "bigram": b[0],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(np.exp(inside[name]), value, rtol=1e-6)
    np.testing.assert_allclose(np.exp(everywhere["bigram"]), b[0])
    np.testing.assert_allclose(np.exp(everywhere["CCMC with escape"]), 0.8 * expected["CCMC"])


def test_batch_means_match_a_loop_over_blocks():
    rng = np.random.default_rng(3)
    values, use = rng.normal(size=103), rng.random(103) < 0.7
    mean, error = models.batch_means(values, 5, use)
    block = np.arange(103) * 5 // 103
    assert mean == pytest.approx(values[use].mean())
    parts = [(values[use & (block == b)] - mean).sum() for b in range(5)]
    assert error == pytest.approx(np.sqrt(5 / 4 * np.sum(np.square(parts))) / use.sum())


def test_batch_means_cover_the_truth_of_a_dependent_sequence():
    """AR(1) with memory 20: intervals of ±2 SE hold the mean 0 in about 95 of 100 series.

    300 series; fewer than 270 would have probability below 1e-3 at a coverage of 0.93.
    """
    rng = np.random.default_rng(4)
    x = np.zeros((300, 8000))
    noise = rng.normal(size=x.shape)
    for t in range(1, x.shape[1]):
        x[:, t] = 0.95 * x[:, t - 1] + noise[:, t]
    hits = 0
    for row in x:
        mean, error = models.batch_means(row, 25)
        hits += abs(mean) < 2.06 * error  # Student's t with 24 degrees of freedom
    assert hits >= 270


@pytest.mark.parametrize(
    ("number", "window", "stride", "blocks"),
    [
        (138, 36, 1, 3),  # once 8 blocks of 17
        (20, 36, 1, 0),
        (8 * 36 - 1, 36, 1, 7),
        (8 * 36, 36, 1, 8),
        (64, 36, 5, 8),  # 8 positions, 5 tokens apart, to a block
        (100_000, 36, 1, 50),
        (0, 1, 1, 0),
    ],
)
def test_blocks_are_at_least_a_window_long(number, window, stride, blocks):
    assert models.count_blocks(number, window, stride) == blocks
    if blocks:
        assert number // blocks * stride >= window


def test_a_short_text_gets_numbers_but_no_verdict(short):
    h = short["held_out"]
    assert h["blocks"] == h["positions"] // short["settings"]["window"] < models.FEWEST_BLOCKS
    for row in h["in_window"] + h["all"]:
        assert row["standard_error"] is None
        assert row["lead_error"] is None
        assert np.isfinite([row["log_likelihood"], row["lead"]]).all()
    json.dumps(short, allow_nan=False)
    report = render(short)
    assert "±" not in report
    assert "beats" not in report
    assert "told apart" not in report
    summary = " ".join(report.split("The text\n")[0].split())
    lead = {row["model"]: row["lead"] for row in h["all"]}["bigram"]
    told = f"The text is too short to tell the CCMC with escape from the bigram ({lead:+.4f})."
    assert told in summary
    assert f"{lead:+.4f}" in report.split("(b) all")[1]
    assert f"no more than {h['blocks']} blocks" in " ".join(report.split())


def test_the_held_out_text_has_no_say_in_the_vocabulary(tmp_path):
    found = []
    for i, end in enumerate(("abc cab " * 20, "abc cXb " * 20)):
        path = tmp_path / f"{i}.txt"
        path.write_text("abc cab bca " * 60 + end)
        found.append(fit_text._split(FitText(path)).vocabulary)
    assert found[0] == found[1]
    assert found[0].unknown is not None


def test_an_unknown_token_that_training_lacks_is_left_out_of_the_facts(short):
    unknown = short["corpus"]["unknown"]
    assert unknown is not None
    assert short["corpus"]["unknown_training"] == 0
    c = short["coverage"]
    assert c["unseen"] == [unknown]
    assert c["connected_rows"] == 15
    assert c["disconnected"] == []
    assert unknown not in short["generation"]["possible_winners"]
    report = " ".join(render(short).split())
    assert "Never in a training window, so that nothing is known of it: (unknown)." in report
    assert "For 15 of 15 last tokens" in report


def test_an_impossible_winner_stops_no_other():
    """The unknown token, never seen, keeps a middling score; no prompt of known tokens has it."""
    vocabulary = Vocabulary(("a", "b", "?"), unknown=2)
    p = np.array([[0.4, 0.1, 0.5], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    found = facts.generate(
        vocabulary, np.array([0, 1]), am.CCMC.from_transition_matrix(p), steps=10, seed=0
    )
    assert found["possible_winners"] == ["a"]


def test_verdicts_say_who_wins():
    def row(lead, error):
        return {"model": "bigram", "lead": lead, "lead_error": error}

    assert verdict("CCMC", row(0.5, 0.1)).startswith("The CCMC beats the bigram by 0.5000")
    assert verdict("CCMC", row(-0.5, 0.1)).startswith("The bigram beats the CCMC by 0.5000")
    assert "can't be told apart" in verdict("CCMC", row(-0.15, 0.1))
    told = "The text is too short to tell the CCMC from the bigram (+0.5000)."
    assert verdict("CCMC", row(0.5, None)) == told


def test_the_split_is_disjoint_and_windows_do_not_straddle(results):
    c, w = results["corpus"], results["windows"]
    assert c["training_tokens"] + c["held_out_tokens"] == c["characters"]
    assert w["training"]["windows"] == c["training_tokens"] - 40
    assert w["held_out"]["windows"] == c["held_out_tokens"] - 40
    assert 0.75 < c["training_tokens"] / c["characters"] < 0.85
    assert c["unknown"] in c["vocabulary"]  # 'z' comes once
    assert "z" not in c["vocabulary"]
    assert c["unknown_training"] == 1


def test_coverage_is_that_of_the_training_windows(results, text_file):
    text = " ".join(text_file.read_text(encoding="utf-8").split())
    c = results["corpus"]
    ids = {t: i for i, t in enumerate(c["vocabulary"])}
    unknown = ids[c["unknown"]]
    tokens = np.array([ids.get(t, unknown) for t in text[: c["training_tokens"]]])
    prompts, following = windows(tokens, 40, len(ids))
    rows = np.flatnonzero(np.asarray(prompts.counts)[np.arange(len(following)), following])
    covered = am.coverage(prompts[rows])
    got = results["coverage"]
    assert got["identifiable"] == covered.num_identifiable
    unlisted = np.asarray(covered.connected).sum()
    assert got["connected_rows"] == unlisted
    assert got["never_last"] == [c["unknown"]]  # it stands at the very start only
    narrow = {row["last"]: row["emitted"] for row in got["narrowest"]}
    assert narrow["q"] == ["u"]
    assert got["separated_rows"] > 0
    assert got["pairs_emitted"] == len(set(zip(tokens[39:-1][rows], following[rows], strict=True)))


def test_the_ccmc_beats_the_unigram_on_the_rhyme(results):
    for table in ("in_window", "all"):
        rows = {row["model"]: row for row in results["held_out"][table]}
        lead = rows["unigram"]["lead"]
        assert lead > 5 * rows["unigram"]["lead_error"]
        first = next(iter(rows.values()))
        assert lead == pytest.approx(
            first["log_likelihood"] - rows["unigram"]["log_likelihood"], abs=1e-9
        )


def test_the_prior_is_the_best_of_those_tried(results):
    tried = {float(k): v for k, v in results["validation_by_prior"].items()}
    assert len(tried) > 1
    assert tried[results["settings"]["prior"]] == max(tried.values())


def test_strongest_transitions_are_among_those_seen(results):
    pairs = {(row["last"], row["next"]) for row in results["strongest"]}
    assert ("q", "u") in pairs
    p = [row["p"] for row in results["strongest"]]
    assert p == sorted(p, reverse=True)


def test_generation_is_watched_from_start_to_end(results):
    g = results["generation"]
    assert g["steps"] == 300
    assert [s["to"] for s in g["window"]["trajectories"][0]["spans"]] == [100, 300]
    assert len(g["once"]["trajectories"]) == 4
    known = len(results["corpus"]["vocabulary"]) - 1
    assert g["once"]["prompt"]["distinct"] == known
    assert g["once"]["prompt"]["effective"] == pytest.approx(known)


def test_run_prints_the_report_and_writes_it(text_file, tmp_path, capsys):
    out = tmp_path / "deep" / "folder"
    config = FitText(text_file, level="word", window=20, prior=1.0, generate=120, out=out)
    assert config.run() == 0
    printed = capsys.readouterr().out
    assert printed == (out / "fit-text.txt").read_text(encoding="utf-8")
    numbers = json.loads((out / "fit-text.json").read_text(encoding="utf-8"))
    assert numbers["settings"]["prior"] == 1.0
    assert numbers["validation_by_prior"] == {}
    assert "unigram" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert sorted(p.name for p in out.iterdir()) == ["fit-text.json", "fit-text.txt"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"level": "line"}, "level: unknown level 'line'"),
        ({"solver": "sgd"}, "solver: unknown solver 'sgd'; known: newton, lbfgs, adam"),
        ({"window": 0}, "window: must be at least 1, got 0"),
        ({"window": 500}, "window: 500 is too long: the validation part of .* has only"),
        ({"holdout": 0.0}, "holdout: must be between 0 and 1, got 0.0"),
        ({"holdout": 1.0}, "holdout: must be between 0 and 1, got 1.0"),
        ({"holdout": float("nan")}, "holdout: must be between 0 and 1, got nan"),
        ({"prior": -1.0}, "prior: must be finite and above 0, got -1.0"),
        ({"generate": 0}, "generate: must be at least 1, got 0"),
        ({"max_tokens": 1}, "max_tokens: must be at least 2, got 1"),
        ({"seed": -1}, "seed: must be at least 0, got -1"),
        ({"seed": 2**32}, r"seed: must be below 2\*\*32, got 4294967296"),
        ({"generate": 3_000_000_000}, r"generate: must be below 2\*\*31, got 3000000000"),
        ({"holdout": 0.999}, "file: .*rhyme.txt is too short: its training part holds"),
    ],
)
def test_bad_parameters_are_named(text_file, change, match):
    with pytest.raises(ValueError, match=match):
        FitText(text_file, **change).run()


def test_a_context_too_long_is_named_before_the_fit(text_file, monkeypatch):
    monkeypatch.setattr(models, "tune", pytest.fail)
    config = FitText(text_file, window=40, generate=2**31 - 40)
    with pytest.raises(ValueError, match=r"generate: .* prompt of 40 tokens, got 2147483608"):
        analyse(config)


def test_files_that_are_no_text_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"file: .*missing\.txt does not exist"):
        FitText(tmp_path / "missing.txt").run()
    for content, match in ((b"", "is empty"), (b"a\xff", "is not UTF-8: byte 0xff at offset 1")):
        path = tmp_path / "bad.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            FitText(path).run()


def test_a_window_that_never_holds_its_next_token_is_named(tmp_path):
    path = tmp_path / "cycle.txt"
    path.write_text("abcdefghij" * 200)
    with pytest.raises(ValueError, match="window: 3 is too short: no window of the fit part"):
        FitText(path, window=3).run()


def test_a_folder_that_cannot_be_written_is_named(text_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: cannot write to .*file"):
        FitText(text_file, out=tmp_path / "file" / "below").run()
    with pytest.raises(ValueError, match=r"out: cannot write to .*file"):
        FitText(text_file, out=tmp_path / "file").run()


def test_a_read_only_folder_is_named_before_any_work(text_file, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("attnmarkov.experiments.fit_text.analyse", pytest.fail)
    with pytest.raises(ValueError, match=r"out: cannot write to .*closed \(.*Permission denied"):
        FitText(text_file, out=tmp_path / "closed").run()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["char", "word"])
def test_the_shipped_text_at_default_settings(level):
    found = analyse(FitText(data.alice_path(), level=level, prior=0.3, generate=2000))
    for table in ("in_window", "all"):
        for row in found["held_out"][table]:
            if row["model"].startswith(("unigram", "window's own")):
                assert row["lead"] > 0.5
                assert row["lead"] > 5 * row["lead_error"]
    bigram = {row["model"]: row for row in found["held_out"]["all"]}["interpolated bigram"]
    assert -0.2 < bigram["lead"] < 0  # the bigram is the better model of the whole text
    assert found["coverage"]["identifiable"] > 0.9 * found["coverage"]["parameters"]
