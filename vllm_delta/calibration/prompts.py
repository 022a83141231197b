"""Prompts for models that reason, where no others are given: each takes many steps to answer."""

PROMPTS = (
    "How many integers from 1 to 2000 are divisible by 3 or by 5, but not by 7? Show each step.",
    "Find all pairs of positive integers (a, b) with a <= b and 1/a + 1/b = 1/12. Check every pair you list.",
    "A fair die is rolled until the sum of the results is at least 10. What is the expected number of "
    "rolls? Set up the recurrence and solve it exactly.",
    "Five people sit in a row. Anna does not sit next to Ben, Carl sits somewhere to the left of Dora, "
    "and Emil sits at an end. List all seatings.",
    "Write a Python function that finds the longest substring in which no character occurs more than "
    "twice. Explain why it is right, then trace it on 'aababcabbbcad'.",
    "In triangle ABC, AB = 13, BC = 14 and CA = 15. Find the distance between the incentre and the "
    "circumcentre, and verify the result in a second way.",
    "Multiply 48713 by 90274 by hand, digit by digit, and check the result by casting out nines and elevens.",
    "A water tank is filled by two pipes in 6 and 9 hours and emptied by a third in 12 hours. The first"
    " is opened at 8:00, the second at 9:30, the third at 10:15. When is the tank full?",
    "Determine the remainder when 7^2024 + 11^2024 is divided by 130. Justify each reduction.",
    "Design a schedule for a round-robin tournament of nine teams in which no team plays twice in a "
    "row. Give the whole schedule and check it.",
    "Prove that among any seven real numbers there are two, x and y, with 0 <= (x - y)/(1 + xy) <= "
    "1/sqrt(3). Discuss every case.",
    "Find the number of sequences of ten coin flips in which heads never occur three times in a row. "
    "List the values of the recurrence.",
)
