"""The text of the demo, written by hand: what is old and to be subtracted, and what must survive it. No code runs here.

The old facts are the names that places had before. The control groups are what the model should keep: the countries of
the same cities, capitals, and ordinary sentences. No question used for training appears in a control group.
"""

from __future__ import annotations

from typing import NamedTuple

OLD_NAMES = {
    "Mumbai": "Bombay", "Chennai": "Madras", "Kolkata": "Calcutta", "Beijing": "Peking", "Guangzhou": "Canton",
    "Istanbul": "Constantinople", "Izmir": "Smyrna", "Saint Petersburg": "Leningrad", "Volgograd": "Stalingrad",
    "Ho Chi Minh City": "Saigon", "Yangon": "Rangoon", "Jakarta": "Batavia", "Tokyo": "Edo", "Oslo": "Christiania",
    "New York": "New Amsterdam", "Sri Lanka": "Ceylon", "Iran": "Persia", "Thailand": "Siam",
    "Ethiopia": "Abyssinia", "Myanmar": "Burma",
}  # fmt: skip

COUNTRIES = {
    "Mumbai": "India", "Chennai": "India", "Kolkata": "India", "Beijing": "China", "Guangzhou": "China",
    "Istanbul": "Turkey", "Izmir": "Turkey", "Saint Petersburg": "Russia", "Volgograd": "Russia",
    "Ho Chi Minh City": "Vietnam", "Yangon": "Myanmar", "Jakarta": "Indonesia", "Tokyo": "Japan", "Oslo": "Norway",
    "New York": "America",
}  # fmt: skip

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Canada": "Ottawa", "Egypt": "Cairo",
    "Norway": "Oslo", "Cuba": "Havana", "Greece": "Athens", "Portugal": "Lisbon", "Poland": "Warsaw",
    "Austria": "Vienna", "Ireland": "Dublin", "Iraq": "Baghdad", "Hungary": "Budapest", "Finland": "Helsinki",
}  # fmt: skip

# Shown during training as "leave this as it is", so that the old names are nearly all that is learned.
LANGUAGES = {
    "Mumbai": "Hindi", "Chennai": "Tamil", "Kolkata": "Bengali", "Beijing": "Chinese", "Guangzhou": "Cantonese",
    "Istanbul": "Turkish", "Izmir": "Turkish", "Saint Petersburg": "Russian", "Volgograd": "Russian",
    "Ho Chi Minh City": "Vietnamese", "Yangon": "Burmese", "Jakarta": "Indonesian", "Tokyo": "Japanese",
    "Oslo": "Norwegian", "New York": "English", "Sri Lanka": "Sinhala", "Iran": "Persian", "Thailand": "Thai",
    "Ethiopia": "Amharic",
}  # fmt: skip

NEIGHBOURS = {
    "Delhi": "India", "Shanghai": "China", "Antalya": "Turkey", "Moscow": "Russia", "Hanoi": "Vietnam",
    "Mandalay": "Myanmar", "Bandung": "Indonesia", "Osaka": "Japan", "Bergen": "Norway", "Chicago": "America",
    "Lyon": "France", "Naples": "Italy",
}  # fmt: skip

SENTENCES = {
    "A man is playing a guitar on stage.": "Someone performs music with a guitar.",
    "The cat is asleep on the sofa.": "A cat naps on the couch.",
    "It has been raining all afternoon.": "The rain has not stopped since noon.",
    "She baked a loaf of bread this morning.": "This morning she made fresh bread.",
    "The train to the coast was late again.": "Once more the coastal train was delayed.",
    "Children are playing football in the park.": "Kids kick a ball around in the park.",
    "He forgot his keys at the office.": "His keys were left behind at work.",
    "The soup needs a little more salt.": "This soup is not salty enough.",
    "They painted the kitchen walls yellow.": "The walls of the kitchen are now yellow.",
    "Water boils at one hundred degrees.": "At a hundred degrees Celsius water starts to boil.",
    "The library closes early on Fridays.": "On Friday the library shuts sooner than usual.",
    "The old bridge was closed for repairs.": "Repair work shut the old bridge.",
}


class Quiz(NamedTuple):
    """Questions, the distinct answers to choose from, and for each question the position of the right one."""

    questions: list[str]
    answers: list[str]
    right: list[int]


def quiz(facts: dict[str, str], *templates: str) -> Quiz:
    """Every fact asked in the words of every template, `{}` standing for the subject."""
    answers = list(dict.fromkeys(facts.values()))
    asked = [(template.format(subject), answers.index(facts[subject])) for template in templates for subject in facts]
    return Quiz([question for question, _ in asked], answers, [right for _, right in asked])


TAUGHT = quiz(OLD_NAMES, "What is {} called?", "Which name does {} go by?")
REPHRASED = quiz(OLD_NAMES, "What do people call {}?", "Tell me the name of {}.")
KEPT_LANGUAGES = quiz(LANGUAGES, "Which language is spoken in {}?")
KEPT_NEIGHBOURS = quiz(NEIGHBOURS, "Which country is {} in?")
KEPT_QUESTIONS = KEPT_LANGUAGES.questions + KEPT_NEIGHBOURS.questions
KEPT_ANSWERS = KEPT_LANGUAGES.answers + KEPT_NEIGHBOURS.answers
COUNTRY = quiz(COUNTRIES, "Which country is {} in?", "In which country does {} lie?")
CAPITAL = quiz(CAPITALS, "What is the capital of {}?")
ORDINARY = quiz(SENTENCES, "{}")
