"""What people read in texts that models write: hand-worked cases, written before the rules, the awkward ones first.

A case of the commonsense family is `(choices, text, strict, stated)`: what the rule of the paper takes (all that
follows the trigger, stripped, and exactly one of the choices), and which choice a reader finds stated. None is "no
answer".
"""

TF = ("true", "false")
S2 = ("solution1", "solution2")
O2 = ("option1", "option2")
A3 = ("answer1", "answer2", "answer3")
A4 = ("answer1", "answer2", "answer3", "answer4")
E4 = ("ending1", "ending2", "ending3", "ending4")

COMMONSENSE = [
    # one answer denied, another given
    (S2, "the correct answer is not solution2 but solution1", None, "solution1"),
    (S2, "the correct answer is solution1, not solution2", None, "solution1"),
    (S2, "The answer isn't solution1. It is solution2.", None, "solution2"),
    (E4, "the correct answer is ending2 rather than ending3", None, "ending2"),
    (TF, "the correct answer is not true", None, None),
    # two answers
    (S2, "the correct answer is solution1 or solution2", None, None),
    (TF, "the correct answer is true/false", None, None),
    (A4, "answer2 and answer3 are both right.", None, None),
    (O2, "the correct answer is option1. No, wait: the correct answer is option2", None, "option2"),
    (O2, "the correct answer is option1. Therefore the correct answer is option1.", None, "option1"),
    # the answer restated, explained, or followed by another question
    (TF, "the correct answer is true. It is true because people feel it.", None, "true"),
    (S2, "the correct answer is solution2 because solution1 would break the glass.", None, "solution2"),
    (
        A4,
        "the correct answer is answer3\n\nPlease choose the correct answer to the question: Why?\n\n"
        "the correct answer is answer1",
        None,
        "answer3",
    ),
    (TF, "the correct answer is false\n\nQuestion: is it so?\nthe correct answer is true", None, "false"),
    (TF, "Answer format: true/false\n\nthe correct answer is false", "false", "false"),
    # letters and numbers in the place of names
    (A4, "answer: (b)", None, "answer2"),
    (A4, "Answer: C", None, "answer3"),
    (A4, "The answer is D) the moon.", None, "answer4"),
    (E4, "the correct answer is 2", None, "ending2"),
    (S2, "the correct answer is a mixture of oil and water", None, None),
    (S2, "the correct answer is solution 2", None, "solution2"),
    (O2, "Option 1", None, "option1"),
    # outside the set
    (A3, "the correct answer is answer4", None, None),
    (S2, "the correct answer is solution3", None, None),
    (A4, "the correct answer is answer12", None, None),
    (S2, "the correct answer is solution11", None, None),
    (TF, "the correct answer is yes", None, "true"),
    (TF, "No, it will not.", None, "false"),
    # no answer
    (TF, "", None, None),
    (TF, "the correct answer is ", None, None),
    (TF, "I do not know.", None, None),
    (O2, "the correct answer is the trophy", None, None),
    # marks, case and space
    (TF, "the correct answer is true.", None, "true"),
    (TF, "the correct answer is True", None, "true"),
    (TF, "The correct answer is true", None, "true"),
    (S2, "the correct answer is **solution1**", None, "solution1"),
    (S2, "the correct answer is: solution1", None, "solution1"),
    (S2, "solution1", None, "solution1"),
    (TF, "\nthe correct answer is  false \n", "false", "false"),
    (E4, "the correct answer is ending4", "ending4", "ending4"),
    (A3, "the correct answer is answer3", "answer3", "answer3"),
    (TF, "Untrue: the correct answer is falsehood", None, None),
]

# `(text, last, stated)`: the last number of the text, and the number that a reader finds stated as the answer.
NUMBERS = [
    # two numbers
    ("She had 5 and bought 3, so she has 8 apples.", "8", "8"),
    ("The answer is 12. There are 7 days in a week.", "7", "12"),
    ("The answer is not 12 but 15.", "15", "15"),
    ("The answer is 5 or 6.", "6", None),
    ("The answer is 3 x 4 = 12 apples in 2 bags.", "2", "12"),
    ("The answer is $3.50 per pound, for 2 pounds.", "2", "3.5"),
    ("3 + 4 = 7", "7", "7"),
    ("1, 2, 3", "3", "3"),
    # restated, or followed by another question
    ("#### 42\nThe final answer is: 42", "42", "42"),
    ("The answer is 14. Therefore, the answer is 14.", "14", "14"),
    ("The answer is 10. No, that is wrong: the answer is 11.", "11", "11"),
    ("The answer is 8.\n\n### Instruction:\nTom has 3 cats. How many are there?", "3", "8"),
    ("The answer is 9.\nQuestion: Ann is 30. How old is Eve?\nThe answer is 31.", "31", "9"),
    # thousands
    ("The answer is 1,000.", "1000", "1000"),
    ("It costs $1,234,567.", "1234567", "1234567"),
    ("#### 12,345.50", "12345.5", "12345.5"),
    ("She counted 1,2 and 3.", "3", "3"),
    ("He chose 1,23", "23", "23"),
    # negative
    ("The answer is -7.", "-7", "-7"),
    ("The answer is \N{MINUS SIGN}7.", "-7", "-7"),
    ("It lost -$20", "-20", "-20"),
    ("It lost $-20", "-20", "-20"),
    ("x = (-5)", "-5", "-5"),
    ("What is left of 10 - 7", "7", "7"),
    ("10-7", "7", "7"),
    ("Read pages 12-15.", "15", "15"),
    ("3 - -4", "-4", "-4"),
    # units
    ("The answer is 30%.", "30", "30"),
    ("The answer is 5kg", "5", "5"),
    ("The answer is 24 m^2.", "24", "24"),
    ("H2O has 3 atoms, as has CO2", "3", "3"),
    ("on the 3rd day", "3", "3"),
    # decimals
    (".75", "0.75", "0.75"),
    ("The answer is 2.50.", "2.5", "2.5"),
    ("The answer is 5.0", "5", "5"),
    ("1.8333333333333335", "1.8333333333333335", "1.8333333333333335"),
    ("It is 1.5e3.", "1500", "1500"),
    # fractions
    ("The answer is 1/2.", "0.5", "0.5"),
    ("The answer is 3 1/2 cups.", "3.5", "3.5"),
    ("2/3 of 36 = 24", "24", "24"),
    ("10/5 = 2", "2", "2"),
    ("The answer is \\frac{3}{4}", "0.75", "0.75"),
    ("\\boxed{18}", "18", "18"),
    # concluded, not stated; in a loop; broken off
    ("Therefore, it takes 20 minutes to cook the other 7.", "7", "20"),
    ("Therefore, the height after 4 months would be 42 feet.", "42", "42"),
    ("Therefore, 8 bees have 48 legs. The answer in Arabic numerals is 48.", "48", "48"),
    ("The answer is that Ms. Hatcher teaches 70.", "70", "70"),
    ("So 6 * 6 = 36. That is the total of the 6 rows.", "6", "36"),
    ("He adds 4 and 5.\n#### 9", "9", "9"),
    ("The box of 12 pens costs $3 in all. " * 5 + "The box of 12 pens", "12", None),
    ("3 - 1 = 2 inches. So the other one is longer, and we can add the length of", "2", None),
    # no answer
    ("", None, None),
    ("I do not know.", None, None),
    ("There are seven apples.", None, None),
    ("5 + 3 is asked for. The answer is", "3", None),
    ("The answer is twelve (12).", "12", "12"),
]

# `(text, stated, first)`: the letter stated as the answer, and the first capital A to E, wherever it stands.
LETTERS = [
    # two letters
    ("The answer is not (A) but (C).", "C", "A"),
    ("Both A and B are correct.", None, "B"),
    ("The answer is B or C.", None, "B"),
    ("The answer is A and D.", None, "A"),
    ("The answer is (A) 23.65, not (B).", "A", "A"),
    ("The answer isn't D.", None, "D"),
    ("The answer is (B). Wait, the answer is (C).", "C", "B"),
    ("The answer is B because A is too small.", "B", "B"),
    ("Option A is wrong. The answer is B.", "B", "A"),
    ("The answer is (B).\n\nQuestion: How far?\nThe answer is (D).", "B", "B"),
    # capitals that are no answer
    ("A train travels 60 km. The answer is D.", "D", "A"),
    ("Distance = 5. So the answer is (C).", "C", "D"),
    ("E is the total energy; the answer is C.", "C", "E"),
    ("Let A be his age; then A = 20.", None, "A"),
    ("Beth walks.", None, "B"),
    ("Answer Choices: (A) 1 (B) 2", None, "A"),
    ("Each of Dan's cars is old.", None, "E"),
    # how it is put
    ("answer: (b)", "B", None),
    ("(e)", "E", None),
    ("C", "C", "C"),
    ("E) 1023.65", "E", "E"),
    ("Answer: B. 35", "B", "A"),
    ("The answer is a.", "A", None),
    ("ANSWER: c)", "C", "A"),
    ("The correct option is B.", "B", "B"),
    ("Option C is correct.", "C", "C"),
    ("Therefore, B is the answer.", "B", "B"),
    ("The answer is option (D).", "D", "D"),
    ("The answer is **D**.", "D", "D"),
    ("The answer is $\\boxed{C}$.", "C", "C"),
    ('The answer is "A".', "A", "A"),
    ("Correct answer - A", "A", "C"),
    ("ANS:B", "B", "A"),
    ("Ans. (D)", "D", "A"),
    ("The answer is 5, which is (C).", "C", "C"),
    ("The answer is A", "A", "A"),
    ("Therefore, m is 3, which is option D.", "D", "D"),
    ("Therefore, the probability is A) 3/13.", "A", "A"),
    ("Option B is even. The only one that is odd is option C) Y.", "C", "B"),
    ("Question now becomes how many.\nANS: D", "D", "A"),
    ("The answer is (A). The answer is not an exception to the rule.", "A", "A"),
    ("(A) 15\n(B) 42\n(C) 39", None, "A"),
    ("(A) 15 (B) 42 (C) 39 (D) 12 (E) 8", None, "A"),
    ("A) 15, B) 42, C) 39, D) 12, E) 8\nOption D is correct.", "D", "A"),
    ("(A) 15, as (B) is odd.", "A", "A"),
    # no answer, or none of those
    ("", None, None),
    ("I cannot say.", None, None),
    ("The answer is F.", None, None),
    ("The answer is 23.65.", None, None),
    ("the answer is a number", None, None),
    ("The correct answer is none of these.", None, None),
]

SENTIMENT = {"negative": "negative", "positive": "positive"}
FOLLOWS = {"yes": "entailment", "maybe": "neutral", "no": "contradiction"}
ALIKE = None
"""Not words, but a similarity of 0 to 5."""

# `(words, text, answer)`: the words by which labels are written, and the label that a reader finds.
GLUE = [
    # two labels, or one denied
    (SENTIMENT, "negative, not positive", "negative"),
    (SENTIMENT, "not positive", None),
    (SENTIMENT, "not negative but positive", "positive"),
    (SENTIMENT, "positive or negative", None),
    (SENTIMENT, "positive/negative", None),
    (SENTIMENT, "positive and negative", None),
    (FOLLOWS, "yes and no", None),
    (FOLLOWS, "Maybe, or no.", None),
    # words inside words, and words that say something else
    (SENTIMENT, "positively", None),
    (SENTIMENT, "nonpositive", None),
    (FOLLOWS, "know", None),
    (FOLLOWS, "No idea.", None),
    (FOLLOWS, "no answer", None),
    (FOLLOWS, "yesterday", None),
    # outside the set
    (SENTIMENT, "neutral", None),
    (SENTIMENT, "mixed", None),
    (FOLLOWS, "entailment", None),
    # no answer
    (SENTIMENT, "", None),
    (SENTIMENT, " \n", None),
    (FOLLOWS, "It is hard to say.", None),
    # marks, case, space, restated, explained
    (SENTIMENT, " Positive", "positive"),
    (SENTIMENT, "NEGATIVE!", "negative"),
    (SENTIMENT, '"positive"', "positive"),
    (SENTIMENT, "**negative**", "negative"),
    (SENTIMENT, "positive sentiment", "positive"),
    (SENTIMENT, "The sentiment is negative.", "negative"),
    (SENTIMENT, "Answer: positive", "positive"),
    (SENTIMENT, "positive\n\nReview: dull .\nSentiment: negative", "positive"),
    (SENTIMENT, "negative. It is negative.", "negative"),
    (FOLLOWS, "Yes, it does.", "entailment"),
    (FOLLOWS, " no", "contradiction"),
    (FOLLOWS, "No it does not follow", "contradiction"),
    (FOLLOWS, "The answer is maybe.", "neutral"),
    # a similarity
    (ALIKE, " 3.8", "3.8"),
    (ALIKE, "4.2 out of 5", "4.2"),
    (ALIKE, "4/5", "4"),
    (ALIKE, "The score is 0.", "0"),
    (ALIKE, "5.000", "5"),
    (ALIKE, "5.5", None),
    (ALIKE, "-1", None),
    (ALIKE, "85%", None),
    (ALIKE, "very much alike", None),
    (ALIKE, "", None),
]

# `(reply, verdict)`: which of two texts a judge's reply prefers, marked as it was asked to, [[A]], [[B]] or [[C]].
VERDICTS = [
    ("[[A]] or [[B]]", None),
    ("[[A]]/[[B]]", None),
    ("[[A]] > [[B]]", None),
    ("[[A]], [[B]], or [[C]]", None),
    ("[[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they are equally good.", None),
    ("I give [[A]] if answer A is better, [[C]] if they are equally good. So: [[B]]", "B"),
    ("[[A]] if I must choose.", "A"),
    ("[[A]], [[A]]", "A"),
    ("[[A]]. On reflection, B is more exact: [[B]]", "B"),
    ("Not [[A]] but [[B]]", "B"),
    ("Answer A is good, but answer B is better.", None),
    ("Both are fine. [[C]]", "tie"),
    ("[[tie]]", "tie"),
    ("[[Tie]]", "tie"),
    ("[[ B ]]", "B"),
    ("**[[A]]**", "A"),
    ("Final verdict: [[B]]", "B"),
    ("Verdict: B", "B"),
    ("A", "A"),
    (" b\n", "B"),
    ("[A]", "A"),
    ("tie", "tie"),
    ("A is better.\n[[A]]", "A"),
    ("[[D]]", None),
    ("[[A", None),
    ("Assistant A", None),
    ("I cannot judge.", None),
    ("", None),
]

# `(reply, rating)`: a whole number from 0 to 2, marked as it was asked for, "Rating: [[1]]".
RATINGS = [
    ("[[0]] or [[1]]", None),
    ("End with one mark, Rating: [[0]], Rating: [[1]] or Rating: [[2]].", None),
    ("Of [[0]], [[1]] and [[2]] it is this. Rating: [[1]]", 1),
    ("[[0]] at first sight. Rating: [[2]]", 2),
    ("Rating: [[1]] out of 2", 1),
    ("1/2", 1),
    ("Rating: 1/2", 1),
    ("Rating: [[0]]", 0),
    ("Rating:[[2]]", 2),
    ("Rating: [2]", 2),
    ("Rating: 2.", 2),
    ("Score: 2", 2),
    ("2", 2),
    ("2\nThe text is fluent.", 2),
    ("**Rating: [[1]]**", 1),
    ("Rating: [[3]]", None),
    ("Rating: 10", None),
    ("Rating: [[1.5]]", None),
    ("Rating: -1", None),
    ("Rating: two", None),
    ("The text has 2 sentences.", None),
    ("[[2]", None),
    ("I cannot rate this.", None),
    ("", None),
]
