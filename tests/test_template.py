"""data/template.py, data/columns.py: columns become one text; brackets in data stay text; bad ones are one line."""

import pytest

from data.columns import lookup
from data.template import MAX_FILLED_CHARS, MAX_TEMPLATE_CHARS, fill, parse_question_and_answer, parse_template

ROW = {
    "question": "2 + 2?",
    "answer": "{4} [[four]] => \\n",
    "empty": "",
    "blank": " \n",
    "none": None,
    "n": 3,
    "x": 0.5,
    "yes": True,
    "data": {"question": "deep", "list": [{"text": "first"}, "second"], "a.b": "dotted inside"},
    "a.b": "dotted",
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question}", "2 + 2?"),
        ("{ question }", "2 + 2?"),
        ("Q: {question} ({n}, {x}, {yes}, {none})", "Q: 2 + 2? (3, 0.5, true, )"),
        ("{answer}", ROW["answer"]),
        ("{data.question} {data.list.0.text} {data.list.1} {a.b}", "deep first second dotted"),
        ("a[[, {question}]]z", "a, 2 + 2?z"),
        ("a[[, {empty}]][[, {blank}]][[, {none}]]z", "az"),
        ("[[{question}{empty}]]|[[{empty}{question}]]", "2 + 2?|"),
        ("[[{answer}]]", ROW["answer"]),
        ('{{"n": {n}, "s": {{}}}}', '{"n": 3, "s": {}}'),
        ("{{{n}}}", "{3}"),
        ("[[[[{n}]]]] [x]", "[[3]] [x]"),
        (r"a\nb\tc\\n\d", "a\nb\tc\\n\\d"),
        ("", ""),
        ("no column, Việt 🙂", "no column, Việt 🙂"),
    ],
)
def test_templates(template: str, text: str) -> None:
    assert fill(parse_template(template), ROW, "row 1") == text


@pytest.mark.parametrize(
    ("template", "question", "answer"),
    [
        ("{question} => {answer}", "2 + 2?", ROW["answer"]),
        ("{question}=>#{n}", "2 + 2?", "#3"),
        (r"Q: {question}\n => {n}\n", "Q: 2 + 2?\n", "3\n"),
    ],
)
def test_an_arrow_parts_question_and_answer(template: str, question: str, answer: str) -> None:
    sides = parse_question_and_answer(template)
    assert [fill(side, ROW, "row 1") for side in sides] == [question, answer]


def test_two_templates_may_hold_arrows() -> None:
    sides = parse_question_and_answer("{n} => ", "x => {n}")
    assert [fill(side, ROW, "row 1") for side in sides] == ["3 => ", "x => 3"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question} {answer}", r"one '=>' must stand between .*; found 0$"),
        ("{question} => {answer} => {n}", r"one '=>' must stand between .*; found 2$"),
        ("{question} => ", r"what stands after '=>' names no column, so that every row would have the same answer$"),
        ("{question} => yes", r"what stands after '=>' names no column"),
        ("[[{question} => {answer}]]", r"'\[\[' at character 1 is not closed; a literal \[\[ is written \[\[\[\[$"),
        ("{question => {answer}}", r"'{' at character 1 has no partner; a literal { is {{$"),
    ],
)
def test_a_template_without_its_two_sides_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--template: {message}"):
        parse_question_and_answer(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{", "'{' at character 1 has no partner"),
        ("a}", "'}' at character 2 has no partner"),
        ("{}", "{} at character 1 names no column; literal braces are doubled"),
        ("{ }", "{} at character 1 names no column"),
        ("{a{b}}", "'{' at character 1 has no partner"),
        ("[[ {n}", r"'\[\[' at character 1 is not closed"),
        ("{n} ]]", r"'\]\]' without '\[\[' at character 5; a literal \]\] is written \]\]\]\]"),
        ("[[ {n} [[ {x} ]] ]]", r"'\[\[' inside an optional part at character 8"),
        ("[[ nothing ]]", "the optional part at character 1 names no column"),
        ("x" * (MAX_TEMPLATE_CHARS + 1), "100,001 characters, at most 100,000"),
    ],
)
def test_a_template_that_does_not_parse(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--system: {message}") as error:
        parse_template(template, "--system")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{answr}", "missing 'answr'; found a.b, answer, blank, data, "),
        ("[[{empty}{answr}]]", "missing 'answr'"),
        ("{data.answer}", "missing 'data.answer'; there is no 'answer' among a.b, list, question"),
        ("{question.text}", "missing 'question.text'; 'text' is looked for in text"),
        ("{none.text}", "missing 'none.text'; 'text' is looked for in null"),
        ("{data.list.2}", "missing 'data.list.2'; '2' is looked for in a list"),
        ("{data.list.-1}", "missing 'data.list.-1'"),
        ("{data.list." + "9" * 5000 + "}", "missing 'data.list.9{50}"),
        ("{n.__class__}", "missing 'n.__class__'; '__class__' is looked for in a number"),
        ("{n!r:>999999999}", "missing 'n!r:>999999999'"),
        ("{data}", "'data' must be text or a number, found an object; name one thing in it, as in data.question"),
        ("{data.list}", "'data.list' must be text or a number, found a list; name one thing in it, as in data.list.0"),
    ],
)
def test_a_column_that_is_missing_or_no_text_names_the_row(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^rows.jsonl: row 7: {message}") as error:
        fill(parse_template(template), ROW, "rows.jsonl: row 7")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("inf"), "'v' must be text or a number, found a number that is not finite$"),
        (float("nan"), "'v' must be text or a number, found a number that is not finite$"),
        ("a\ud83d", "'v' has half a character at position 1$"),
        (b"x", "'v' must be text or a number, found bytes$"),
        ([], "'v' must be text or a number, found an empty list$"),
    ],
)
def test_values_that_are_no_text(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^row 1: {message}"):
        fill(parse_template("{v}"), {"v": value}, "row 1")


def test_what_a_template_makes_is_bounded() -> None:
    template = parse_template("{v}" * 30_000)
    with pytest.raises(ValueError, match=f"makes 90,000,000 characters of it, at most {MAX_FILLED_CHARS:,}$"):
        fill(template, {"v": "x" * 3000}, "row 1")


def test_a_row_that_holds_itself_is_walked_no_further_than_its_path() -> None:
    row: dict = {"a": "x"}
    row["self"] = row
    assert lookup(row, "self.self.self.a", "row 1") == "x"
    with pytest.raises(ValueError, match="must be text or a number, found an object"):
        fill(parse_template("{self.self}"), row, "row 1")
