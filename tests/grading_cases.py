"""What `Grader.grade` must say in mode math: responses, the gold answers they meet, verdicts.

The verdicts of CASES are a mathematician's. KNOWN_LIMITS are those of the grader where they
differ from a mathematician's, so that a new Math-Verify that mends one shows.
"""

import random
import string

Case = tuple[str, str, str]  # response or answer, gold answer, verdict


def _boxed(*cases: Case) -> tuple[Case, ...]:
    return tuple((f"\\boxed{{{answer}}}", gold, verdict) for answer, gold, verdict in cases)


_MATRIX = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
_JUNK = "".join(random.Random(0).choices(string.printable, k=100_000))
_PLAIN_JUNK = _JUNK.translate(str.maketrans("", "", "\\{}"))
_LONG = 100_000

_ANSWERS = _boxed(
    # Fractions and mixed numbers
    (r"\frac{10}{20}", "0.5", "correct"),
    (r"\dfrac34", "3/4", "correct"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}", "correct"),
    (r"\frac{1}{-2}", r"-\frac12", "correct"),
    (r"\frac{\frac12}{3}", r"\frac16", "correct"),
    (r"\displaystyle\frac12", "0.5", "correct"),
    (r"\frac{3}{4}", r"\frac{4}{3}", "wrong"),
    (r"1\frac{1}{2}", r"\frac{3}{2}", "correct"),
    (r"3\tfrac{1}{4}", "3.25", "correct"),
    (r"-1\frac12", "-1.5", "correct"),
    (r"1\frac12", r"\frac{1}{2}", "wrong"),
    # Decimals
    ("12.50", "12.5", "correct"),
    (".5", "0.50", "correct"),
    ("0.3333", r"\frac13", "wrong"),
    ("0.1", "0.10001", "wrong"),
    ("2.0000001", "2", "wrong"),
    # Signs, the Unicode minus among them
    ("- 5", "-5", "correct"),
    ("-(-5)", "5", "correct"),
    ("+5", "5", "correct"),
    ("5", "-5", "wrong"),
    ("\u22125", "-5", "correct"),
    ("\u22123/4", r"-\frac34", "correct"),
    ("5", "\u22125", "wrong"),
    # Intervals
    ("[-2, 7]", r"x \in [-2,7]", "correct"),
    (r"x \in (1,2)", "(1,2)", "correct"),
    ("(1,2)", "[1,2]", "wrong"),
    ("[1,2]", "[1,2)", "wrong"),
    (r"\left(0, \tfrac{1}{2}\right]", "(0, 0.5]", "correct"),
    (r"(0,\infty)", r"(0, +\infty)", "correct"),
    (r"(-\infty, 3]", r"x \le 3", "correct"),
    (r"3 \ge x", r"x \le 3", "correct"),
    ("x>3", r"x \ge 3", "wrong"),
    ("(1,2)", "1<x<2", "correct"),
    ("[1,2]", "1<x<2", "wrong"),
    (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty) \cup (-\infty,0)", "correct"),
    (r"(-\infty,0)\cup[1,\infty)", r"(-\infty,0)\cup(1,\infty)", "wrong"),
    (r"[0,1]\cup[1,2]", "[0,2]", "correct"),
    (r"\mathbb{R}", r"(-\infty,\infty)", "correct"),
    (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)", "correct"),
    # Matrices and vectors
    (_MATRIX.replace("pmatrix", "bmatrix"), _MATRIX, "correct"),
    (_MATRIX.replace("4", r"\frac{8}{2}"), _MATRIX, "correct"),
    (_MATRIX.replace("4", "5"), _MATRIX, "wrong"),
    (r"\begin{pmatrix}2\\4\end{pmatrix}", r"2\begin{pmatrix}1\\2\end{pmatrix}", "correct"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", "wrong"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", "wrong"),
    # Units
    (r"5\text{ cm}", "5", "correct"),
    (r"5\text{cm}", "5", "correct"),
    (r"5\,\mathrm{~cm}", "5", "correct"),
    ("5 cm", "5", "correct"),
    (r"12 \text{ cm}^2", "12", "correct"),
    ("12", r"12 \text{ cm}^2", "correct"),
    (r"20 \text{ square units}", "20", "correct"),
    ("5 hours", "5", "correct"),
    (r"7\text{ cm}", "5", "wrong"),
    # Sets and lists
    (r"\{2, 1\}", r"\{1,2\}", "correct"),
    (r"\{1,1,2\}", r"\{1,2\}", "correct"),
    (r"\left\{1,2\right\}", "2,1", "correct"),
    (r"\{0.5, 2\}", r"\{\frac12,2\}", "correct"),
    (r"1 \text{ and } 2", "1,2", "correct"),
    ("1;2", "1,2", "correct"),
    (r"x=1 \text{ or } x=2", "1,2", "correct"),
    ("5, 6", "6", "wrong"),
    ("6", "5,6", "wrong"),
    (r"\{1,2,3\}", r"\{1,2\}", "wrong"),
    (r"\{\}", r"\emptyset", "correct"),
    (r"\emptyset", r"\{0\}", "wrong"),
    (r"\{(1,2),(2,1)\}", "(2,1),(1,2)", "correct"),
    # Tuples
    (r"\left(\frac12, 3\right)", "(0.5,3)", "correct"),
    ("(1,2)", "(2,1)", "wrong"),
    ("(1,2,3)", "(3,2,1)", "wrong"),
    ("2,1", "(1,2)", "wrong"),
    ("(x,y)=(1,2)", "(1,2)", "correct"),
    ("(1,2),(3,4)", "(3,4),(1,2)", "correct"),
    ("(1,2),(3,4)", "(2,1),(3,4)", "wrong"),
    # Percent and degrees
    (r"50\%", "50", "correct"),
    ("50", r"50\%", "correct"),
    (r"50\%", "0.05", "wrong"),
    (r"90^\circ", "90", "correct"),
    (r"45\text{ degrees}", r"45^{\circ}", "correct"),
    # Plus or minus
    (r"\pm 2", r"\{-2,2\}", "correct"),
    (r"x=\pm 2", r"\pm 2", "correct"),
    (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2", "correct"),
    ("2", r"\pm 2", "wrong"),
    # Infinity
    (r"+\infty", r"\infty", "correct"),
    (r"-\infty", r"\infty", "wrong"),
    # Words and letters of choices
    ("Tuesday", r"\text{Tuesday}", "correct"),
    (r"\text{Tuesday}", r"\text{Thursday}", "wrong"),
    (r"\text{even}", "even", "correct"),
    (r"\text{even}", r"\text{odd}", "wrong"),
    ("yes", r"\text{Yes}", "correct"),
    ("Yes", "No", "wrong"),
    ("A", r"\text{A}", "correct"),
    ("(C)", "C", "correct"),
    (r"\textbf{(B)}", "B", "correct"),
    (r"\text{B}", "A", "wrong"),
    # Equations
    ("x = 3", "3", "correct"),
    ("3", "x=3", "correct"),
    ("x=3", "x=4", "wrong"),
    ("abc=5", "5", "correct"),
    ("f(x)=x^2", "x^2", "correct"),
    ("y-2x=1", "y = 1 + 2x", "correct"),
    ("2x+y=1", "4x+2y=2", "correct"),
    ("x^2+y^2=1", "y^2+x^2-1=0", "correct"),
    ("b=2,a=1", "a=1,b=2", "correct"),
    (r"\angle ABC = 60^\circ", "60", "correct"),
    # Equal up to algebra
    ("2(x+1)", "2x+2", "correct"),
    ("(x-1)^2", "x^2+2x+1", "wrong"),
    ("n(n+1)/2", r"\frac{n^2+n}{2}", "correct"),
    (r"\frac{x^2-1}{x-1}", "x+1", "correct"),
    ("2x", "2y", "wrong"),
    ("p - q", "q-p", "wrong"),
    (r"2\sin x\cos x", r"\sin(2x)", "correct"),
    (r"\ln 4", r"2\ln 2", "correct"),
    (r"\binom{5}{2}", "10", "correct"),
    (r"\sum_{k=1}^{4}k", "10", "correct"),
    ("5!", "120", "correct"),
    # Thousands
    ("1,000", "1000", "correct"),
    ("1{,}000", "1000", "correct"),
    ("1000", r"1{,}000", "correct"),
    (r"1,\!000", "1000", "correct"),
    ("12,345.60", "12345.6", "correct"),
    ("1,000", "1", "wrong"),
    ("10,000", "1,000", "wrong"),
    ("1.000", "1000", "wrong"),
    # Powers of ten
    (r"1.5 \times 10^3", "1500", "correct"),
    (r"2 \cdot 10^{-3}", "0.002", "correct"),
    (r"1.5 \times 10^4", "1500", "wrong"),
    # Currency
    (r"\$32", "32", "correct"),
    ("$32", "32", "correct"),
    (r"\$1,234.50", "1234.5", "correct"),
    (r"32 \text{ dollars}", r"\$32", "correct"),
    # Roots
    (r"\sqrt 8", r"2\sqrt{2}", "correct"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}", "correct"),
    (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3", "correct"),
    (r"\sqrt[3]{8}", "2", "correct"),
    ("8^{1/3}", "2", "correct"),
    (r"\sqrt{2}", r"\sqrt{3}", "wrong"),
    (r"\sqrt{x^2}", "x", "wrong"),
    ("1.414", r"\sqrt{2}", "wrong"),
    # Pi
    (r"\frac{\pi}{2}", r"0.5\pi", "correct"),
    ("2π", r"\pi \cdot 2", "correct"),
    ("3.14", r"\pi", "wrong"),
    # Complex numbers
    ("3+4i", "4i+3", "correct"),
    ("3-4i", "3+4i", "wrong"),
    (r"\cos\frac{\pi}{3}+i\sin\frac{\pi}{3}", r"\frac12+\frac{\sqrt3}{2}i", "correct"),
    # Bases
    ("2516_8", "2516_{8}", "correct"),
    ("2516_8", "2561_8", "wrong"),
    ("5", "101_2", "wrong"),
    # AMC's floats and AIME's leading zeros
    ("27", "27.0", "correct"),
    ("27.00", "27", "correct"),
    ("3159", "3159.5", "wrong"),
    ("33", "033", "correct"),
    ("033", "33.0", "correct"),
    ("330", "033", "wrong"),
    ("0", "000", "correct"),
    # Ratios
    ("3:2", r"\frac32", "correct"),
    ("3:2", "2:3", "wrong"),
    # What surrounds an answer inside its box
    ("{{{5}}}", "5", "correct"),
    ("$5$", "5", "correct"),
    (r"\mathbf{5}", "5", "correct"),
    (" 5 ", "5", "correct"),
    ("\n5\n", "5", "correct"),
    ("5" + " " * _LONG, "5", "correct"),
    # Nothing that can be read
    (r"\notlatex{}", "6", "wrong"),
    (r"\;", "6", "wrong"),
    (r"\frac{1}{0}", "6", "wrong"),
    ("None", "6", "wrong"),
    (_PLAIN_JUNK, "6", "wrong"),
    (" ", "6", "no answer"),
    ("", "6", "no answer"),
)

CASES: tuple[Case, ...] = (
    *_ANSWERS,
    # Several boxes
    (r"\boxed{26} then \boxed{27}", "27", "correct"),
    (r"\boxed{27} then \boxed{26}", "27", "wrong"),
    (r"\boxed{26} and \boxed{27.00}", "27", "correct"),
    (r"\boxed{\boxed{5}}", "5", "correct"),
    # Boxes without braces, that do not close, or that are none
    (r"$\boxed 5$", "5", "correct"),
    (r"It is \boxed 5.", "5", "correct"),
    (r"\boxed-5", "-5", "correct"),
    (r"\boxed{5", "5", "no answer"),
    (r"\boxed{4} or rather \boxed{5", "4", "correct"),
    (r"\boxed{\notlatex{}{", "6", "no answer"),
    (r"\fbox{5}", "5", "no answer"),
    ("5", "5", "no answer"),
    ("\n\n", "5", "no answer"),
    ("", "5", "no answer"),
    # Before, around and after a box
    (r"<think>so \boxed{4}</think>\boxed{5}", "5", "correct"),
    (r"<think>so \boxed{5}</think>It is 5.", "5", "correct"),
    (r"<think>\boxed{5}? No, \boxed{4}", "5", "wrong"),
    (r"\boxed{5}.", "5", "correct"),
    ("\\[\n\\boxed{\n\\frac{10}{20}\n}\n\\]\n", "0.5", "correct"),
    (r"\\boxed{5}", "5", "correct"),
    # 100 kB
    (_JUNK, "5", "no answer"),
    (_JUNK + r"\boxed{5}", "5", "correct"),
    ("{" * _LONG, "5", "no answer"),
    (r"\boxed{" + "{" * _LONG, "5", "no answer"),
    ("{" * _LONG + r"\boxed{5}", "5", "correct"),
)

KNOWN_LIMITS: tuple[Case, ...] = (
    *_boxed(
        # A reader takes all of these for right.
        # Punctuation, or words around the answer
        ("5.", "5", "wrong"),
        ("5,", "5", "wrong"),
        (r"5\\", "5", "wrong"),
        ("**5**", "5", "wrong"),
        (r"\text{Answer: } 5", "5", "wrong"),
        ("B. 5", "B", "wrong"),
        (r"\text{Yes, it converges}", "Yes", "wrong"),
        (r"\text{odd function}", r"\text{odd}", "wrong"),
        # Mixed numbers, repeating decimals and powers of ten as they are typed
        ("1 1/2", r"\frac32", "wrong"),
        (r"0.\overline{3}", r"\frac{1}{3}", "wrong"),
        ("1.5e3", "1500", "wrong"),
        (r"1\,000", "1000", "wrong"),
        # Percent and degrees: a percentage is its bare number
        ("50%", "50", "wrong"),
        (r"50\%", "0.5", "wrong"),
        (r"25\%", r"\frac14", "wrong"),
        ("90°", "90", "wrong"),
        (r"90^{\circ}", r"\frac{\pi}{2}", "wrong"),
        # Units that are not known, or squared without \text
        ("12 cm^2", "12", "wrong"),
        ("10 miles per hour", "10", "wrong"),
        ("€32", "32", "wrong"),
        # Symbols as characters or words
        ("\u20135", "-5", "wrong"),
        ("∞", r"\infty", "wrong"),
        (r"\text{infinity}", r"\infty", "wrong"),
        ("√2", r"\sqrt{2}", "wrong"),
        ("2pi", r"2\pi", "wrong"),
        ("½", "0.5", "wrong"),
        # An inequality for an interval, though not the other way round; a set written otherwise
        (r"x \le 3", r"(-\infty,3]", "wrong"),
        ("]1,2[", "(1,2)", "wrong"),
        (r"\varnothing", r"\emptyset", "wrong"),
        (r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}", "wrong"),
        ("1,2,...,5", "1,2,3,4,5", "wrong"),
        # A vector for a point
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", "wrong"),
        (r"\langle 1, 2 \rangle", "(1,2)", "wrong"),
        (r"2\mathbf{i}+3\mathbf{j}", r"3\mathbf{j}+2\mathbf{i}", "wrong"),
        # i is a letter like any other; roots of negative numbers are complex
        ("i^2", "-1", "wrong"),
        ("(1+i)^2", "2i", "wrong"),
        (r"e^{i\pi}", "-1", "wrong"),
        (r"\sqrt[3]{-8}", "-2", "wrong"),
        (r"7 \bmod 4", "3", "wrong"),
        # The base is dropped
        ("101_2", "5", "wrong"),
        (r"101_{\text{two}}", "101_2", "wrong"),
        # A reader takes all of these for wrong.
        ("101_3", "101_2", "correct"),
        # Rounding
        ("0.333333333", r"\frac13", "correct"),
        (r"x \approx 3", "3", "correct"),
        # A name and a unit are dropped, whichever they are
        ("y=3", "x=3", "correct"),
        (r"5\text{ cm}", r"5\text{ m}", "correct"),
        # A tuple is as good as a set; so is a set as a tuple, in the order in which it is written
        ("(2,1)", r"\{1,2\}", "correct"),
        ("(3,2,1)", "1,2,3", "correct"),
        (r"\{1,2,3\}", "(1,2,3)", "correct"),
        # Words are products of their letters, and case is lost
        ("silent", "listen", "correct"),
        ("no", "on", "correct"),
        ("X", "x", "correct"),
    ),
    # TeX boxes the command alone; a reader takes it for right.
    (r"\boxed\frac12", "1/2", "no answer"),
)
