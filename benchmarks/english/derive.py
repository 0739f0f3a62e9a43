"""Row functions of the benchmark's own tasks, which are made from E2E NLG and SQuAD; see `tasks/`.

Each is `(row, split) -> rows`; a row that has no answer for the task is left out.
"""

import re
from typing import Any

Row = dict[str, Any]

# Two ways in which E2E's meanings write the same value.
PRICES = {"cheap": 0, "less than £20": 0, "moderate": 1, "£20-25": 1, "high": 2, "more than £30": 2}
RATINGS = {"low": 0, "1 out of 5": 0, "average": 1, "3 out of 5": 1, "high": 2, "5 out of 5": 2}
FAMILY = {"no": 0, "yes": 1}
FOODS = {"English": 0, "Chinese": 1}
AREAS = {"city centre": 0, "riverside": 1}
# Articles of SQuAD by topic; others (broadcasting, schools) are left out.
TOPICS = {
    0: (
        "Amazon_rainforest Fresno,_California Jacksonville,_Florida Kenya Newcastle_upon_Tyne Rhine "
        "Southern_California Victoria_(Australia) Warsaw"
    ),
    1: (
        "Chloroplast Computational_complexity_theory Ctenophora Force Geology Immune_system Oxygen Packet_switching "
        "Pharmacy Prime_number Steam_engine"
    ),
    2: "Black_Death French_and_Indian_War Genghis_Khan Huguenot Martin_Luther Normans Yuan_dynasty",
    3: (
        "1973_oil_crisis Civil_disobedience Economic_inequality European_Union_law Imperialism Islamism "
        "Intergovernmental_Panel_on_Climate_Change Scottish_Parliament"
    ),
}
TOPIC_OF = {title: topic for topic, titles in TOPICS.items() for title in titles.split()}
NUMBER_WORDS = set(
    "one two three four five six seven eight nine ten eleven twelve half million billion hundred thousand".split()
)


def area(row: Row, split: str) -> list[Row]:
    """Label a restaurant's description with its area: 0 the centre, 1 the river."""
    return _labelled(row, "area", AREAS)


def family(row: Row, split: str) -> list[Row]:
    """Label a restaurant's description with whether it suits families: 0 no, 1 yes."""
    return _labelled(row, "familyFriendly", FAMILY)


def food(row: Row, split: str) -> list[Row]:
    """Label a restaurant's description with its food: 0 English, 1 Chinese, the only two that training rows have."""
    return _labelled(row, "food", FOODS)


def price(row: Row, split: str) -> list[Row]:
    """Label a restaurant's description with its prices: 0 low, 1 medium, 2 high."""
    return _labelled(row, "priceRange", PRICES)


def rating(row: Row, split: str) -> list[Row]:
    """Label a restaurant's description with its customers' rating: 0 low, 1 medium, 2 high."""
    return _labelled(row, "customer rating", RATINGS)


def number(row: Row, split: str) -> list[Row]:
    """Label a question with what its answer is: 0 words, 1 a number or a date."""
    answer = row["answers"]["text"][0].lower()
    return [{**row, "label": int(bool(re.search(r"\d", answer)) or not NUMBER_WORDS.isdisjoint(answer.split()))}]


def topic(row: Row, split: str) -> list[Row]:
    """Label a question with the topic of its article: 0 geography, 1 science, 2 history, 3 politics."""
    return [{**row, "label": TOPIC_OF[row["title"]]}] if row["title"] in TOPIC_OF else []


def _labelled(row: Row, attribute: str, labels: dict[str, int]) -> list[Row]:
    found = re.search(rf"(?:^|, ){attribute}\[([^]]*)\]", row["meaning_representation"])
    return [{**row, "label": labels[found[1]]}] if found else []
