import numpy as np
import pandas as pd
import pytest
from test_comparison import drawn
from test_scores import evaluation

from entropylens.errors import SettingError
from entropylens.table1 import latex, markdown, table1, write_table1


def model(*chances, n=16):
    names = ("aime_2025", "math500", "amc2023", "own")
    return evaluation(
        *(
            drawn(name, np.full(20, chance), n, place)
            for place, (name, chance) in enumerate(zip(names, chances, strict=False))
        )
    )


def test_layout_of_the_paper():
    found = table1({"GRPO": model(0.2, 0.8, 0.5, 0.1), "BuPO": model(0.4, 0.7, 0.5, 0.1)})
    assert list(found) == [
        "AMC (Avg@16)", "MATH500 (Avg@16)", "AIME25 (Avg@16)", "own (Avg@16)", "Average",
    ]  # fmt: skip
    assert found.index.tolist() == ["GRPO", "BuPO"]
    grpo = model(0.2, 0.8, 0.5, 0.1)
    assert found.loc["GRPO", "AMC (Avg@16)"] == 100 * grpo.score("amc2023")
    assert found.loc["GRPO", "Average"] == pytest.approx(100 * grpo.score("average"))


def test_titles_are_never_doubled():
    names = ("math500", "math_hard", "math-ai/aime25", "MATH-500")
    asked = [drawn(it, np.full(20, 0.1 + 0.2 * place), 16) for place, it in enumerate(names)]
    found = table1({"m": evaluation(*asked)})
    assert list(found) == [
        "math500 (Avg@16)", "MATH-500 (Avg@16)", "AIME25 (Avg@16)", "math_hard (Avg@16)", "Average",
    ]  # fmt: skip
    assert found.iloc[0].nunique() == 5


def test_best_is_bold_and_second_underlined():
    table = pd.DataFrame(
        {"AMC": [50.0, 70.001, 69.999, np.nan, 10.0]}, index=["a", "b_1", "c", "d", "e"]
    )
    rows = markdown(table).splitlines()
    assert rows[0] == "| Methods | AMC |"
    assert rows[2:] == [
        "| a | <u>50.00</u> |", "| b_1 | **70.00** |", "| c | **70.00** |", "| d | - |",
        "| e | 10.00 |",
    ]  # fmt: skip
    text = latex(table)
    assert r"b\_1 & \textbf{70.00} \\" in text
    assert r"a & \underline{50.00} \\" in text
    assert text.count("{") == text.count("}")


def test_one_row_has_no_best():
    assert "**" not in markdown(table1({"only": model(0.5)}))


def test_files(tmp_path):
    table = table1({"a": model(0.2, 0.8), "b": model(0.3, 0.7)})
    paths = write_table1(table, tmp_path / "new")
    assert [path.name for path in paths] == ["table1.csv", "table1.md", "table1.tex"]
    read = pd.read_csv(paths[0], index_col=0)
    pd.testing.assert_frame_equal(read, table.round(2))


def test_what_cannot_be_put_together():
    with pytest.raises(SettingError, match="same -n"):
        table1({"a": model(0.2), "b": model(0.2, n=8)})
    with pytest.raises(SettingError, match="no evaluation"):
        table1({})
