"""AlpacaEval: results compared with the package's, judges, error messages, and the summary."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("alpaca_eval", reason="alpaca-eval is not installed in this environment")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))

import evaluate_alpaca_eval  # noqa: E402
import summarize_run  # noqa: E402
from sppo.core.artifacts import read_json, write_json  # noqa: E402
from sppo.core.errors import UserError  # noqa: E402
from sppo.evaluation import alpaca_eval, results  # noqa: E402
from sppo.evaluation.judges import ALPACA_EVAL  # noqa: E402
from sppo.evaluation.repeated_judgments import flips  # noqa: E402
from sppo.preferences.base import Group  # noqa: E402
from sppo.workflow.configuration import resolve  # noqa: E402

# A folder with public data sets. Without it, the tests that need a data set are skipped.
PUBLIC_DATA = Path(os.environ.get("SPPO_PUBLIC_DATA", "/nonexistent"))
KEY = "sk-secret-of-the-test"


def outputs(generator: str, n: int = 30, seed: int = 0) -> list[dict]:
    lengths = np.random.default_rng(seed).integers(20, 400, size=n)
    return [
        {
            "instruction": f"Write about {number}.",
            "output": f"{generator} {'x' * length}",
            "generator": generator,
            "dataset": "ours",
            "prompt_id": str(number),
            "finish_reason": "stop",
        }
        for number, length in enumerate(lengths)
    ]


class Judge:
    """A preference model with a given function for P(second beats first)."""

    name = "judge"

    def __init__(self, probability) -> None:
        self.probability = probability

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        return [self.logits(group) for group in groups]

    def logits(self, group: Group) -> np.ndarray:
        p = np.clip(self.probability(group.prompt, *group.responses), 1e-300, 1 - 1e-16)
        logit = np.log(p) - np.log1p(-p)
        return np.array([[7.0, -logit], [logit, -3.0]])  # The diagonal has no meaning.


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the program in this process on `ours` and `base`; returns the result."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter.safetensors", "ranker.json"):
        (adapter / name).touch()

    def run(ours, base, *more, probability=None, judge=None, seed=0, fits=0):
        monkeypatch.setattr(alpaca_eval, "load_preference_model", lambda *_: Judge(probability))
        (tmp_path / "ours.json").write_text(json.dumps(ours))
        (tmp_path / "base.json").write_text(json.dumps(base))
        arguments = [
            "--outputs",
            tmp_path / "ours.json",
            "--reference",
            tmp_path / "base.json",
            "--output",
            tmp_path / "out" / "alpaca_eval.json",
            "--annotations",
            tmp_path / "out" / "annotations.json",
            "--judge",
            judge or adapter,
            "--judge-base",
            adapter,
            "--seed",
            seed,
            "--length-controlled-bootstrap",
            fits,
        ]
        monkeypatch.setattr(
            sys,
            "argv",
            [
                str(ROOT / "src" / "evaluation/evaluate_alpaca_eval.py"),
                *map(str, arguments),
                *map(str, more),
            ],
        )
        evaluate_alpaca_eval.main()
        return read_json(tmp_path / "out" / "alpaca_eval.json")

    return run


def soft(prompt: str, first: str, second: str) -> float:
    """A judge that depends on the number in the prompt and prefers longer outputs."""
    number = int(re.search(r"\d+", prompt)[0])
    return 1 / (1 + np.exp(-(1.0 + np.sin(number) + (len(second) - len(first)) / 300)))


def test_results_equal_those_of_the_package(call, tmp_path):
    from alpaca_eval.metrics import glm_winrate

    result = call(outputs("policy", seed=1), outputs("base"), probability=soft)
    rows = read_json(tmp_path / "out" / "annotations.json")
    wins = np.array([row["preference"] for row in rows]) - 1
    assert result["win_rate"] == pytest.approx(100 * wins.mean(), abs=1e-9)
    assert result["standard_error"] == pytest.approx(
        100 * wins.std(ddof=1) / np.sqrt(len(wins)), abs=1e-9
    )
    assert result["n_wins"] == (wins > 0.5).sum()
    assert result["n_wins_base"] == (wins < 0.5).sum()
    assert result["n_draws"] == 0
    assert result["n_total"] == 30
    assert result["avg_length"] != result["reference_avg_length"]
    with (
        alpaca_eval.length_model(30, None) as (formula, file),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(glm_winrate, "hf_hub_download", lambda **_: file)
        package = glm_winrate.get_length_controlled_winrate(
            rows, glm_name=formula, save_weights_dir=None
        )
    assert result["length_controlled_winrate"] == package["length_controlled_winrate"] != 50.0
    assert (tmp_path / "out" / "alpaca_eval.json.record.json").exists()
    assert (tmp_path / "out" / "annotations.json.record.json").exists()


def test_annotations_have_the_package_s_format(call, tmp_path):
    # The program sorts outputs that have another order than the reference.
    call(outputs("policy", seed=1)[::-1], outputs("base"), probability=soft)
    rows = read_json(tmp_path / "out" / "annotations.json")
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in outputs("base")]
    for row in rows:
        assert {
            "instruction",
            "dataset",
            "output_1",
            "generator_1",
            "output_2",
            "generator_2",
            "annotator",
            "preference",
        } <= set(row)
        assert (row["generator_1"], row["generator_2"]) == ("base", "policy")
        assert row["output_1"].startswith("base")
        assert row["output_2"].startswith("policy")


@pytest.mark.parametrize(("policy_wins", "rate"), [(True, 100), (False, 0)])
def test_win_rate_counts_the_policy_s_wins(call, policy_wins, rate):
    def probability(prompt, first, second):
        return 1 - 1e-12 if second.startswith("policy") == policy_wins else 1e-12

    result = call(outputs("policy", seed=1), outputs("base"), probability=probability)
    assert result["win_rate"] == pytest.approx(rate, abs=1e-6)
    assert (result["n_wins"], result["n_wins_base"]) == ((30, 0) if policy_wins else (0, 30))


def test_equal_outputs_are_draws_without_the_judge(call):
    ours, base = outputs("policy", seed=1), outputs("base")
    for one, other in zip(ours[:4], base):
        one["output"] = other["output"]
    result = call(
        ours, base, probability=lambda prompt, first, second: 1 / 0 if first == second else 0.9
    )
    assert result["n_draws"] == 4
    assert result["n_wins"] == 26
    assert result["win_rate"] == pytest.approx((4 * 50 + 26 * 90) / 30)


def test_policy_equal_to_its_reference_gets_50(call):
    result = call(
        [row | {"generator": "policy"} for row in outputs("base")],
        outputs("base"),
        probability=soft,
        fits=3,
    )
    assert result["win_rate"] == 50.0
    assert result["length_controlled_winrate"] == 50.0
    assert result["n_draws"] == 30
    # Here 50 is no failure of the model, so there is no warning.
    assert result["length_controlled_at_50"] == 100.0
    assert result["length_controlled_warning"] is None


def test_policy_that_loses_everything_gets_0():
    rows = [
        {
            "preference": 1.0,
            "instruction": row["instruction"],
            "output_1": row["output"],
            "output_2": "short",
            "generator_1": "base",
            "generator_2": "policy",
        }
        for row in outputs("base")
    ]
    with alpaca_eval.length_model(len(rows), None) as (formula, file):
        assert alpaca_eval.metrics(rows, formula, file)["length_controlled_winrate"] == 0.0


@pytest.mark.parametrize("answer", ["", " \n", "Yes."])
def test_policy_with_empty_or_short_answers_is_flagged(call, capfd, answer):
    """The judge compares lengths, so the win rate is low. But LC is above 50."""
    ours = [row | {"output": answer} for row in outputs("policy")]
    result = call(
        ours,
        outputs("base"),
        probability=lambda prompt, first, second: 1 / (1 + np.exp((len(first) - len(second)) / 80)),
    )
    said = capfd.readouterr().err
    assert result["win_rate"] < 20
    assert result["length_controlled_winrate"] > 60
    assert (
        "so far apart that alpaca-eval's model may have failed"
        in result["length_controlled_warning"]
    )
    assert (
        "warning: do not rely on the length-controlled win rate: "
        f"{result['length_controlled_warning']}\n" in said
    )
    assert result["n_empty"] == (0 if answer.strip() else 30)
    assert ("30 of 30 answers" in said and "are empty" in said) == (not answer.strip())


def test_length_controlled_warning_follows_alpaca_eval():
    """It warns of a difference above 10 points and above a quarter of the way to 0 or 100."""
    assert (
        "12.0, the win rate 40.0: so far apart that alpaca-eval's model may have failed"
        in alpaca_eval.length_controlled_warning(40.0, 12.0)
    )
    assert alpaca_eval.length_controlled_warning(40.0, 70.0)
    for win_rate in (5.1, 45.0, 49.9, 60.0):
        assert "it is exactly 50" in alpaca_eval.length_controlled_warning(win_rate, 50.0)
    for fine in ((40.0, 35.0), (50.0, 50.0), (0.0, 0.0), (100.0, 100.0), (40.0, 50.1)):
        assert alpaca_eval.length_controlled_warning(*fine) is None


def test_share_of_refits_at_50_equals_the_package_s(call, tmp_path, capfd):
    """The judge hardly prefers a side: LC of all outputs is not 50, but of some resamples it is."""
    from alpaca_eval.metrics import glm_winrate

    def unrelated(prompt, first, second):
        return 0.565 + 0.3 * np.sin(7 * int(re.search(r"\d+", prompt)[0]))

    result = call(outputs("policy", seed=1), outputs("base"), probability=unrelated, fits=8)
    rows = read_json(tmp_path / "out" / "annotations.json")
    drawn = np.random.default_rng(0).integers(30, size=(10000, 30))[:8]
    with (
        alpaca_eval.length_model(30, None) as (formula, file),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(glm_winrate, "hf_hub_download", lambda **_: file)
        frame = pd.DataFrame(rows)
        rates = [
            glm_winrate.get_length_controlled_winrate(
                frame.iloc[chosen], glm_name=formula, save_weights_dir=None
            )["length_controlled_winrate"]
            for chosen in drawn
        ]
    at_50 = sum(rate == 50.0 for rate in rates)
    assert 0 < at_50 < 8
    assert result["length_controlled_winrate"] != 50.0
    assert result["length_controlled_at_50"] == pytest.approx(100 * at_50 / 8)
    warning = result["length_controlled_warning"]
    assert warning.startswith(f"{100 * at_50 / 8:.1f}% of its refits are exactly 50")
    assert f"do not rely on the length-controlled win rate: {warning}\n" in capfd.readouterr().err
    # The tables show the mark and the reason.
    assert results.rate(result, "length_controlled_winrate").endswith(results.DOUBTFUL)
    assert results.doubts({"iteration 1": result}) == [
        f"iteration 1: (!) do not rely on the LC win rate: {warning}."
    ]


def test_share_of_refits_at_50_is_null_without_refits(call):
    result = call(outputs("policy", seed=1), outputs("base"), probability=soft, fits=0)
    assert result["length_controlled_at_50"] is None
    assert result["length_controlled_winrate_interval"] is None


def test_clear_win_has_no_refit_at_50(call):
    result = call(
        outputs("policy", seed=1),
        outputs("base"),
        probability=lambda prompt, first, second: 0.7 + 0.2 * soft(prompt, first, second),
        fits=5,
    )
    assert result["length_controlled_at_50"] == 0.0
    assert result["length_controlled_warning"] is None


def test_intervals_pinned_at_50_are_flagged():
    for pinned in (([50.0, 63.0], 3.0), ([39.1, 50.0], 2.0), ([48.0, 61.0], 5.5)):
        said = alpaca_eval.pinned_warning(*pinned)
        assert f"{pinned[1]:.1f}% of its refits are exactly 50" in said
    for fine in (([48.0, 61.0], 5.0), ([50.1, 61.0], 1.0), (None, None), ([45.0, 49.9], 0.0)):
        assert alpaca_eval.pinned_warning(*fine) is None


def test_normal_evaluation_has_no_warning(call, capfd):
    result = call(
        outputs("policy", seed=1), outputs("base"), "--policy", "policy", probability=soft
    )
    assert result["length_controlled_warning"] is None
    assert result["n_empty"] == 0
    assert "warning" not in capfd.readouterr().err


def test_outputs_of_another_policy_are_refused(call, tmp_path):
    with pytest.raises(
        UserError, match="ours.json holds the outputs of sppo/iter1, not of sppo/iter2; delete it"
    ):
        call(outputs("sppo/iter1"), outputs("base"), "--policy", "sppo/iter2", probability=soft)
    assert not (tmp_path / "out").exists()


def test_values_of_the_neutral_difficulty_do_not_matter(tmp_path):
    ours, base = outputs("policy", seed=1), outputs("base")
    rows = alpaca_eval.PreferenceAnnotator("judge", Judge(soft)).annotate_head2head(
        *map(_frame, (base, ours))
    )
    with alpaca_eval.length_model(len(base), None) as (formula, file):
        neutral = alpaca_eval.metrics(rows, formula, file)
        lines = file.read_text().splitlines()
    rng = np.random.default_rng(0)
    values = [f"{rng.random()},{i},{rng.normal()},{rng.normal()},False,x" for i in range(len(rows))]
    other = tmp_path / "df_gamed.csv"
    other.write_text("\n".join([lines[0], *values]))
    assert alpaca_eval.metrics(rows, formula, other) == neutral


def _frame(rows):
    import pandas as pd

    return pd.DataFrame(rows)


def test_intervals_contain_the_estimate_and_shrink_with_n(call):
    few = call(outputs("policy", 25, 1), outputs("base", 25), probability=soft, fits=40)
    many = call(outputs("policy", 200, 1), outputs("base", 200), probability=soft, fits=40)
    for key in ("win_rate", "length_controlled_winrate"):
        width = []
        for result in (few, many):
            low, high = result[f"{key}_interval"]
            assert low <= result[key] <= high
            width.append(high - low)
        assert width[1] < 0.7 * width[0]
    low, high = many["win_rate_interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * many["standard_error"], rel=0.1)


def test_equal_seeds_give_equal_files_for_any_thread_count(call, tmp_path):
    file, seen = tmp_path / "out" / "alpaca_eval.json", []
    for threads in (1, 2):
        call(
            outputs("policy", seed=1),
            outputs("base"),
            "--threads",
            threads,
            probability=soft,
            fits=6,
        )
        seen.append(file.read_bytes())
    assert seen[0] == seen[1]
    other = call(outputs("policy", seed=1), outputs("base"), probability=soft, seed=1)
    assert other["win_rate_interval"] != json.loads(seen[0])["win_rate_interval"]


def test_failed_judgment_is_an_error(call, tmp_path, monkeypatch):
    annotation = alpaca_eval.PreferenceAnnotator._annotation

    def fails_on_7(self, one, two, preference):
        row = annotation(self, one, two, preference)
        if one["instruction"] == "Write about 7.":
            row = row | {"preference": float("nan")}
        return row

    monkeypatch.setattr(alpaca_eval.PreferenceAnnotator, "_annotation", fails_on_7)
    said = r"failed on 1 of 30 instructions, first on 'Write about 7\.'"
    with pytest.raises(UserError, match=said):
        call(outputs("policy", seed=1), outputs("base"), probability=soft)
    assert not (tmp_path / "out").exists()


# --- files of outputs ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows.append(rows[2]),
            r"entries 3 and 31 have the same instruction 'Write about 2\.'",
        ),
        (lambda rows: rows.pop(4), r"outputs lack the reference's instruction 'Write about 4\.'"),
        (
            lambda rows: rows[5].update(instruction="Another"),
            r"outputs lack the reference's instruction 'Write about 5\.'",
        ),
        (
            lambda rows: rows.append(rows[0] | {"instruction": "More"}),
            "reference lacks the outputs' instruction 'More'",
        ),
        (lambda rows: rows[1].pop("output"), "entry 2 has no text in 'output'"),
        (lambda rows: rows[1].update(generator="x"), "entry 2 is by x, entry 1 by policy"),
        (lambda rows: [row.update(generator="base") for row in rows], "give them different names"),
        (lambda rows: rows.clear(), "not a list of outputs"),
    ],
)
def test_bad_outputs_are_clear_errors(call, change, message):
    rows = outputs("policy")
    change(rows)
    with pytest.raises(UserError, match=message):
        call(rows, outputs("base"), probability=soft)


def test_difficulty_needs_the_canonical_order(call, tmp_path):
    with pytest.raises(UserError, match="not AlpacaEval's 805 instructions in their order"):
        call(
            outputs("policy"),
            outputs("base"),
            "--difficulty",
            tmp_path / "df_gamed.csv",
            probability=soft,
        )


# --- judges ---


def test_incomplete_judge_settings_are_one_line_errors(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    keys = ("judge", "judge_model", "judge_base_url")
    for arguments, message in [
        (("weighted_alpaca_eval_gpt4_turbo", None, None), "needs a key; export OPENAI_API_KEY"),
        (("openai", None, "http://localhost:1/v1"), "alpaca_eval.judge_model"),
        (("openai", "m", None), "alpaca_eval.judge_base_url"),
        (("no_such_judge", None, None), "unknown judge no_such_judge"),
        ((str(tmp_path / "none"), None, None), "is missing"),
    ]:
        with pytest.raises(UserError, match=message):
            ALPACA_EVAL.check(dict(zip(keys, arguments, strict=True)))


def test_judge_on_a_local_server_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = {"judge": "openai", "judge_model": "m", "judge_base_url": "http://localhost:1/v1"}
    ALPACA_EVAL.check(judge)


def test_program_without_a_key_ends_with_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    program = subprocess.run(
        [
            sys.executable,
            ROOT / "src" / "evaluation/evaluate_alpaca_eval.py",
            "--outputs",
            "a",
            "--reference",
            "b",
            "--output",
            "c",
            "--annotations",
            "d",
            "--judge",
            "weighted_alpaca_eval_gpt4_turbo",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert program.returncode == 1
    assert not list(tmp_path.iterdir())
    assert program.stderr.startswith("error: ")
    assert program.stderr.count("\n") == 1
    assert "OPENAI_API_KEY" in program.stderr


def test_checking_a_judge_imports_no_heavy_package():
    code = (
        "import sys; from sppo.evaluation.judges import ALPACA_EVAL;"
        "ALPACA_EVAL.check({'judge': 'openai', 'judge_model': 'm', 'judge_base_url': 'http://x/v1'});"
        "assert not {'torch', 'alpaca_eval', 'pandas', 'openai', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "src")


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server that prefers the policy's output with probability 0.8.

    `logprobs` says how it treats requests for log-probabilities: "given" returns them, "ignored"
    does not, "refused" is an error. The other two values imitate models that reason: "if told not
    to reason" returns them, "after reasoning" refuses several parameters. The answer to a judgment
    whose prompt contains the text `broken` is "?".
    """

    def __init__(self, logprobs: str, broken: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.logprobs = logprobs
        self.broken = broken
        self.prefers_first = False  # whatever the first answer is
        self.html = False  # If true, each answer is a web page.
        self.status = 200  # Another status makes each answer an error.
        # The next answers to judgments: a status, or a body that is not a completion.
        self.plan: list[int | str] = []
        # What the server has seen and sent.
        self.judged = 0
        self.keys: set[str] = set()
        self.letters: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.add(self.headers["Authorization"])
        key = self.headers["Authorization"].split()[-1]
        if self.server.html:
            return self.send(200, b"<html>\n<body>Welcome</body></html>", "text/html")
        if self.server.status != 200:
            return self.reply(self.server.status, {"error": {"message": f"bad key {key}"}})
        if refusal := self.refused_parameter(request):
            return self.reply(400, {"error": refusal})
        text = request["messages"][-1]["content"]
        answers = []
        if alpaca_eval.TRIAL["instruction"] not in text:
            answers = re.findall(r'"output": """(\w*)', text)
        if answers and self.server.plan:
            answer = self.server.plan.pop(0)
            if isinstance(answer, int):
                return self.reply(answer, {"error": {"message": "busy"}})
            return self.send(200, answer.encode())
        first = not answers or self.server.prefers_first or answers[0] == "policy"
        letter = "m" if first else "M"
        if answers:
            self.server.judged += 1
            self.server.letters.add(letter)
        if self.server.broken and self.server.broken in text:
            letter = "?"
        content = None
        if request.get("logprobs") and self.server.logprobs in ("given", "if told not to reason"):
            content = self.log_probabilities(letter)
        self.reply(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "logprobs": content,
                        "message": {"role": "assistant", "content": letter},
                    }
                ],
            },
        )

    def refused_parameter(self, request):
        """The error for a parameter that this server does not accept; None if it accepts all."""
        kind = self.server.logprobs
        if kind in ("after reasoning", "if told not to reason") and "max_tokens" in request:
            return {
                "message": "use max_completion_tokens",
                "code": "unsupported_parameter",
                "param": "max_tokens",
            }
        refused = {"temperature", "top_p", "logprobs", "reasoning_effort"}
        if kind == "after reasoning" and refused & request.keys():
            return {
                "message": "temperature does not support 0",
                "code": "unsupported_value",
                "param": "temperature",
            }
        if kind == "refused" and request.get("logprobs"):
            return {"message": "logprobs are not supported"}
        return None

    def log_probabilities(self, letter):
        """The answer's log-probabilities: 0.8 for `letter`, or 1 for the unreadable "?"."""
        odds = {letter: 0.8, "M" if letter == "m" else "m": 0.2} if letter != "?" else {"?": 1.0}
        tops = [
            {"token": token, "logprob": float(np.log(p)), "bytes": None}
            for token, p in odds.items()
        ]
        return {"content": [tops[0] | {"top_logprobs": tops}]}

    def reply(self, status, body):
        self.send(status, json.dumps(body).encode())

    def send(self, status, data, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*arguments):
        servers.append(Server(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


READING = {"temperature": 1, "top_p": 1.0, "logprobs": True, "top_logprobs": 5}


@pytest.mark.parametrize(
    ("logprobs", "rate", "request_"),
    [
        ("given", 80, {"max_tokens": 1} | READING),
        (
            "if told not to reason",
            80,
            {"max_completion_tokens": 1, "reasoning_effort": "none"} | READING,
        ),
        ("ignored", 100, {"max_tokens": 8, "temperature": 0, "top_p": 1.0}),
        ("refused", 100, {"max_tokens": 8, "temperature": 0, "top_p": 1.0}),
        ("after reasoning", 100, {}),
    ],
)
def test_judge_on_an_openai_compatible_server(
    call, serve, monkeypatch, tmp_path, capfd, logprobs, rate, request_
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(logprobs)
    # A model with "instruct" in its name is still asked through the chat interface.
    result = call(
        outputs("policy", seed=1),
        outputs("base"),
        "--judge-model",
        "tiny-instruct",
        "--judge-base-url",
        server.url,
        judge="openai",
    )
    assert result["win_rate"] == pytest.approx(rate)
    assert result["n_total"] == server.judged == 30
    assert result["judge_details"] == {
        "model": "tiny-instruct",
        "base_url": server.url,
        "reads": "logprobs" if rate == 80 else "text",
        "request": request_,
    }
    # The package changes the order of the outputs at random. The win rate accounts for this.
    assert server.letters == {"m", "M"}
    assert server.keys == {f"Bearer {KEY}"}
    assert not any(KEY in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY not in "".join(capfd.readouterr())


def test_both_orders_cancel_a_preference_for_a_place(call, serve, monkeypatch, tmp_path, capfd):
    """The judge takes the first answer with probability 0.8, whatever it is."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("given")
    server.prefers_first = True
    arguments = ("--judge-model", "m", "--judge-base-url", server.url)
    pair = (outputs("policy", seed=1), outputs("base"))
    assert call(*pair, *arguments, judge="openai")["win_rate"] != pytest.approx(50)
    assert server.judged == 30
    arguments += ("--both-orders", "true", "--judge-passes", "2")
    result = call(*pair, *arguments, judge="openai")
    assert result["win_rate"] == pytest.approx(50)
    assert server.judged == 120  # the 30 judgments of the first call are kept
    said = capfd.readouterr().err
    assert re.search(r"Judgments to ask for: 90, about .* Already finished: 30", said)
    details = result["judge_details"]
    assert (details["both_orders"], details["passes"]) == (True, 2)
    assert (details["order_flips"], details["pass_flips"]) == (100, 0)
    (row, *_) = read_json(tmp_path / "out" / "annotations.json")
    assert [sorted(orders) for orders in row["judgments"]] == [
        [pytest.approx(1.2), pytest.approx(1.8)]
    ] * 2
    assert call(*pair, *arguments, judge="openai") == result
    assert server.judged == 120


def test_flips_are_shares_of_decided_pairs():
    rows = [
        {"judgments": [[1.2, 1.8], [1.9, 1.9]]},
        {"judgments": [[1.2, 1.4], [1.2, 1.4]]},
        {"judgments": [[1.5, 1.4], [1.2, 1.5]]},
    ]
    found = flips(rows)
    assert found["order_flips"] == 50  # of two pairs without a draw
    assert found["pass_flips"] == 25  # of four
    assert flips([{"judgments": [[1.2]]}]) == {"order_flips": None, "pass_flips": None}


def test_local_judge_is_not_asked_twice():
    config = resolve({"alpaca_eval": {"both_orders": True}})[""]
    with pytest.raises(UserError, match="always compares both orders"):
        alpaca_eval.check_inputs(config, "")


def test_gpt4_judge_of_the_package_is_used_by_name(call, serve, monkeypatch, tmp_path):
    import alpaca_eval

    package = Path(alpaca_eval.__file__).parent

    def files() -> set[Path]:
        return {file for file in package.rglob("*") if "__pycache__" not in file.parts}

    before = files()
    server = serve("given")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)  # The OpenAI client reads this variable.
    result = call(
        outputs("policy", seed=1), outputs("base"), judge="weighted_alpaca_eval_gpt4_turbo"
    )
    assert result["win_rate"] == pytest.approx(80)
    assert server.judged == 30
    annotations = read_json(tmp_path / "out" / "annotations.json")
    assert annotations[0]["annotator"] == "weighted_alpaca_eval_gpt4_turbo"
    assert files() == before  # The package's folder has no new weights and no new cache.


def test_local_server_needs_no_key(call, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    server = serve("given")
    call(
        outputs("policy", 6, 1),
        outputs("base", 6),
        "--judge-model",
        "m",
        "--judge-base-url",
        server.url,
        judge="openai",
    )
    assert server.keys == {"Bearer EMPTY"}


def test_only_failed_judgments_are_requested_again(call, serve, monkeypatch, tmp_path, capfd):
    """The number of requests is printed before they are sent, because they may cost money."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("given", "Write about 7.")
    arguments = (
        outputs("policy", seed=1),
        outputs("base"),
        "--judge-model",
        "m",
        "--judge-base-url",
        server.url,
    )
    with pytest.raises(UserError, match="failed on 1 of 30"):
        call(*arguments, judge="openai")
    assert not (tmp_path / "out" / "alpaca_eval.json").exists()
    assert re.search(
        r"Judgments to ask for: 30, about [1-9][\d,]+ tokens to read .* Already finished: 0",
        capfd.readouterr().err,
    )
    server.broken, server.judged = "", 0
    assert call(*arguments, judge="openai")["win_rate"] == pytest.approx(80)
    assert server.judged == 1
    assert re.search(r"Judgments to ask for: 1, .* Already finished: 29", capfd.readouterr().err)


def test_refusing_server_is_an_error_without_the_key(call, serve, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("given")
    server.status = 401
    with pytest.raises(UserError, match="bad key") as error:
        call(
            outputs("policy"),
            outputs("base"),
            "--judge-model",
            "m",
            "--judge-base-url",
            server.url,
            judge="openai",
        )
    assert KEY not in str(error.value) + "".join(capfd.readouterr())


def test_busy_server_is_asked_again(call, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("given")
    server.plan = [429, 503]
    result = call(
        outputs("policy", 6, 1),
        outputs("base", 6),
        "--judge-model",
        "m",
        "--judge-base-url",
        server.url,
        judge="openai",
    )
    assert result["n_total"] == 6
    assert server.judged == 6


@pytest.mark.parametrize("body", ["not JSON", "{}", '{"choices": null}'])
def test_invalid_completion_is_an_error(call, serve, monkeypatch, tmp_path, body):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("given")
    server.plan = [body] * 200
    with pytest.raises(UserError, match="fix it and run again"):
        call(
            outputs("policy", 6, 1),
            outputs("base", 6),
            "--judge-model",
            "m",
            "--judge-base-url",
            server.url,
            judge="openai",
        )
    assert not (tmp_path / "out" / "alpaca_eval.json").exists()


@pytest.mark.parametrize("judge", ["openai", "weighted_alpaca_eval_gpt4_turbo"])
def test_unreadable_judge_is_quoted_before_any_judgment(call, serve, monkeypatch, judge):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("given", alpaca_eval.TRIAL["instruction"])
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    model = ["--judge-model", "tiny", "--judge-base-url", server.url] if judge == "openai" else []
    with pytest.raises(
        UserError,
        match=r"judge (tiny|weighted_.*_turbo) cannot be read: .* it answers '\?'; no judgment",
    ) as error:
        call(outputs("policy", 6, 1), outputs("base", 6), *model, judge=judge)
    assert server.judged == 0
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("judge", ["openai", "weighted_alpaca_eval_gpt4_turbo"])
def test_web_page_instead_of_an_answer_is_an_error(call, serve, monkeypatch, judge):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("given")
    server.html = True
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    model = ["--judge-model", "tiny", "--judge-base-url", server.url] if judge == "openai" else []
    with pytest.raises(
        UserError, match="its answer is not a chat completion .*; is the address right"
    ):
        call(outputs("policy", 6, 1), outputs("base", 6), *model, judge=judge)


def test_finished_judgments_need_no_trial_request(call, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("given")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    arguments = (outputs("policy", 6, 1), outputs("base", 6))
    call(*arguments, judge="weighted_alpaca_eval_gpt4_turbo")
    server.status = 500
    again = call(*arguments, judge="weighted_alpaca_eval_gpt4_turbo")
    assert again["win_rate"] == pytest.approx(80)


def test_changed_judge_settings_ignore_old_judgments(call, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve("given")
    arguments = (
        outputs("policy", 6, 1),
        outputs("base", 6),
        "--judge-model",
        "m",
        "--judge-base-url",
        server.url,
    )
    call(*arguments, judge="openai")
    call(*arguments, judge="openai")
    assert server.judged == 6
    settings = alpaca_eval._settings_of
    monkeypatch.setattr(
        alpaca_eval, "_settings_of", lambda config: settings(config) + "one word more"
    )
    call(*arguments, judge="openai")
    assert server.judged == 12
    server.logprobs = "refused"  # Now the text of the answer is read.
    call(*arguments, judge="openai")
    assert server.judged == 18


def test_instructions_in_the_judge_s_training_are_counted(call, tmp_path, capfd):
    from sppo.preferences.embedded_data import instruction_hash

    hashes = [instruction_hash(f"Write about {n}.") for n in (3, 5, 99)]
    (tmp_path / "adapter" / "training_instructions.txt").write_text("\n".join(hashes))
    result = call(outputs("policy"), outputs("base"), probability=soft)
    assert result["judge_details"]["instructions_seen_in_training"] == 2
    assert "trained on 2 of these 30" in capfd.readouterr().err


# --- published results ---


@pytest.mark.skipif(
    not PUBLIC_DATA.exists(), reason="the published annotations are not on this machine"
)
def test_published_preferences_give_the_published_results(call, tmp_path):
    import alpaca_eval
    import pandas as pd

    model = "claude-2"
    rows = (
        pd.read_parquet(PUBLIC_DATA / "alpaca_eval_2_gpt4_turbo_annotations.parquet")
        .query("model == @model")
        .sort_values("row")
    )
    given = dict(zip(rows["instruction"], rows["preference"] - 1))
    base = read_json(PUBLIC_DATA / "alpaca_eval_reference_outputs_gpt4_1106_preview.json")
    assert [row["instruction"] for row in base] == list(rows["instruction"])
    ours = [
        {"instruction": one, "output": two, "generator": model}
        for one, two in zip(rows["instruction"], rows["output_2"])
    ]
    result = call(
        ours,
        base,
        "--difficulty",
        PUBLIC_DATA / "alpaca_eval_df_gamed_reconstructed.csv",
        probability=lambda prompt, first, second: given[prompt],
    )
    board = (
        Path(alpaca_eval.__file__).parent
        / "leaderboards"
        / "data_AlpacaEval_2"
        / "weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"
    )
    published = pd.read_csv(board, index_col=0).loc[model]
    for key in (
        "win_rate",
        "standard_error",
        "n_wins",
        "n_wins_base",
        "n_draws",
        "n_total",
        "avg_length",
    ):
        assert result[key] == pytest.approx(published[key], abs=1e-9), key
    # The difficulties are a reconstruction, and the result says that they are not official.
    assert result["length_controlled_winrate"] == pytest.approx(
        published["length_controlled_winrate"], abs=0.5
    )
    assert result["length_controlled_model"] == "length_controlled_v1"
    assert result["difficulty"]["official"] is False


# --- the summary ---


RUNS = {"": (50, 53, 56), "permuted/": (None, 49)}


@pytest.fixture
def run_folder(tmp_path):
    """results/ with two iterations of main and one of the run `permuted`."""
    for run, rates in RUNS.items():
        for number, rate in enumerate(rates):
            if rate is None:
                continue
            folder = tmp_path / f"{run}iter{number}"
            found = {
                "win_rate": rate,
                "win_rate_interval": [rate - 2, rate + 2],
                "length_controlled_winrate": rate - 1.0,
                "length_controlled_winrate_interval": [rate - 5, rate + 3] if number else None,
                "avg_length": 300 + number,
                "reference_avg_length": 299,
                "n_total": 100,
                "judge": "judge",
                "judge_details": {},
                "reference": "base",
            }
            write_json(folder / "alpaca_eval.json", found)
            write_json(folder / "ranker_estimate.json", {"win_rate": rate + 4.0})
            for stage in ("a", "b"):
                write_json(folder / f"{stage}.record.json", {"seconds": 30.0 * (number + 1)})
            if number:
                steps = [
                    {"step": step, "log_ratio_chosen": -step, "log_ratio_rejected": -2.5 * step}
                    for step in range(1, number + 3)
                ]
                lines = "".join(json.dumps(row) + "\n" for row in [*steps, {"train_loss": 1.0}])
                (folder / "train_log.jsonl").write_text(lines)
    return tmp_path


def summarize(folder, monkeypatch, *more):
    lists = {
        "--evaluations": "iter*/*.json",
        "--train-logs": "iter*/train_log.jsonl",
        "--records": "iter*/?.record.json",
    }
    arguments = []
    for flag, pattern in lists.items():
        files = [*sorted(folder.glob(pattern)), *sorted(folder.glob(f"permuted/{pattern}"))]
        is_record = [".record." in file.name for file in files]
        wanted = flag == "--records"
        arguments += [flag, *(str(f) for f, record in zip(files, is_record) if record == wanted)]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            str(ROOT / "src" / "reporting/summarize_run.py"),
            "--results",
            str(folder),
            *arguments,
            "--output",
            str(folder / "summary.md"),
            "--plot",
            str(folder / "figures" / "win_rate.png"),
            "--length-plot",
            str(folder / "figures" / "length.png"),
            *more,
        ],
    )
    summarize_run.main()


def cells_of(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_summary_lists_every_iteration(run_folder, monkeypatch, capsys):
    summarize(run_folder, monkeypatch)
    text = (run_folder / "summary.md").read_text()
    assert capsys.readouterr().out == text
    assert "on 100 instructions, by the embedded judge" in text
    cells = cells_of(text)
    dash = ["-", "-"]
    assert cells[2] == ["0", "50.0 [48.0, 52.0]", "49.0", "300", "54.0", *dash, "1.0"]
    last = ["2", "56.0 [54.0, 58.0]", "55.0 [51.0, 59.0]", "302", "60.0", "-4.0", "-10.0", "3.0"]
    assert cells[4] == last
    assert cells[5][0] == "1, permuted"
    assert f"{run_folder}/figures/win_rate.svg" in text.splitlines()[-1]
    assert (run_folder / "figures" / "win_rate.png").read_bytes().startswith(b"\x89PNG")
    svg = (run_folder / "figures" / "win_rate.svg").read_bytes()
    summarize(run_folder, monkeypatch)
    assert (run_folder / "figures" / "win_rate.svg").read_bytes() == svg


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        ((53, 56), "each more than the one before. The last interval is above 50."),
        ((56, 51), "not each more than the one before. The last interval contains 50."),
        ((49, 45), "not each more than the one before. The last interval is below 50."),
    ],
)
def test_summary_says_what_happened_either_way(run_folder, monkeypatch, rates, sentence):
    for number, rate in enumerate(rates, start=1):
        file = run_folder / f"iter{number}" / "alpaca_eval.json"
        changed = {"win_rate": rate, "win_rate_interval": [rate - 2, rate + 2]}
        write_json(file, read_json(file) | changed)
    summarize(run_folder, monkeypatch)
    text = (run_folder / "summary.md").read_text()
    assert sentence in text
    compared = "do not overlap" if rates[0] > 53 else "overlap"
    said = (
        f"permuted wins 49.0% after iteration 1, where main wins {rates[0]:.1f}%. Their intervals"
    )
    assert f"{said} {compared}." in text
    assert "of one training each" in text


def test_summary_of_a_run_takes_the_base_of_main(run_folder, monkeypatch):
    base = [str(run_folder / "iter0" / name) for name in ("alpaca_eval.json",)]
    summarize(run_folder, monkeypatch, "--run=permuted", "--base", *base)
    cells = cells_of((run_folder / "summary.md").read_text())
    assert [row[0] for row in cells[2:4]] == ["0", "1"]
    assert cells[2][1].startswith("50.0") and cells[3][1].startswith("49.0")


def test_summary_of_a_run_without_training_has_the_base(run_folder, program):
    """With iterations: 0 only the base is evaluated."""
    program(
        summarize_run,
        *("--results", run_folder),
        *("--base", run_folder / "iter0" / "alpaca_eval.json"),
        *("--evaluations", "--train-logs", "--records"),
        *("--output", run_folder / "summary.md"),
        *("--plot", run_folder / "a.png"),
        *("--length-plot", run_folder / "b.png"),
    )
    text = (run_folder / "summary.md").read_text()
    assert [row[:2] for row in cells_of(text)[2:]] == [["0", "50.0 [48.0, 52.0]"]]
    assert "log-ratio" not in text
    assert "The policies win" not in text


def test_summary_marks_doubtful_rates_and_empty_answers(run_folder, monkeypatch):
    file = run_folder / "iter2" / "alpaca_eval.json"
    write_json(
        file,
        read_json(file)
        | {
            "length_controlled_winrate": 50.0,
            "length_controlled_warning": "it is exactly 50",
            "n_empty": 7,
        },
    )
    summarize(run_folder, monkeypatch)
    text = (run_folder / "summary.md").read_text()
    assert "50.0 [51.0, 59.0] (!) |" in text
    assert text.count("(!)") == 2
    assert (
        "\niteration 2: 7 of 100 answers are empty.\n"
        "\niteration 2: (!) do not rely on the LC win rate: it is exactly 50.\n"
    ) in text


def test_summary_refuses_inconsistent_evaluations(run_folder, monkeypatch):
    file = run_folder / "iter1" / "alpaca_eval.json"
    write_json(file, read_json(file) | {"n_total": 50})
    with pytest.raises(UserError, match="differ in judge, reference or n"):
        summarize(run_folder, monkeypatch)
    write_json(file, {"win_rate": 1})
    with pytest.raises(UserError, match="has no win_rate_interval"):
        summarize(run_folder, monkeypatch)
    with pytest.raises(UserError, match="not in a folder named iter<number>"):
        summarize_run.iteration(Path("results/alpaca_eval.json"))


def test_summary_refuses_a_run_without_evaluations(run_folder, monkeypatch):
    with pytest.raises(UserError, match="no alpaca_eval.json of the run nope"):
        summarize(run_folder, monkeypatch, "--run=nope")


def test_preference_0_is_a_draw():
    """The package once wrote a draw as 0."""
    row = {
        "instruction": "a",
        "output_1": "x",
        "output_2": "y",
        "generator_1": "base",
        "generator_2": "policy",
    }
    rows = [row | {"instruction": str(n), "preference": p} for n, p in enumerate((0.0, 2.0))]
    with alpaca_eval.length_model(2, None) as (formula, difficulty):
        assert alpaca_eval.metrics(rows, formula, difficulty)["win_rate"] == 75
