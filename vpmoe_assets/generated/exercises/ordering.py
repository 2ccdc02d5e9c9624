"""Problems about order and letters: sorting step by step, a shifted alphabet, a ranking from clues."""
# ruff: noqa: E501 -- a sentence stays on one line, so that the languages can be compared

import bisect
import random
from collections.abc import Iterator
from itertools import pairwise

from vpmoe_assets.generated.exercises.draft import BRIEF, Draft, Step, answer, reasoning, take

_SORT = {
    "en": (
        (
            "Sort these numbers in ascending order with insertion sort and show the list after every insertion: {items}",
            "show me insertion sort on {items}, one line per pass (smallest first)",
        ),
        "Insertion sort keeps a sorted list and puts one number after the other into its place. After each insertion the list is:",
        "Sorted in ascending order: **{items}**.",
    ),
    "it": (
        (
            "Ordina questi numeri in senso crescente con l'ordinamento per inserimento e mostra l'elenco dopo ogni inserimento: {items}",
        ),
        "L'ordinamento per inserimento mantiene un elenco ordinato e vi inserisce un numero alla volta. Dopo ogni inserimento l'elenco è:",
        "In ordine crescente: **{items}**.",
    ),
    "pl": (
        (
            "Posortuj te liczby rosnąco metodą sortowania przez wstawianie i pokaż listę po każdym wstawieniu: {items}",
        ),
        "Sortowanie przez wstawianie utrzymuje posortowaną listę i wstawia do niej po jednej liczbie. Po każdym wstawieniu lista wygląda tak:",
        "W porządku rosnącym: **{items}**.",
    ),
    "fr": (
        (
            "Trie ces nombres dans l'ordre croissant avec le tri par insertion et montre la liste après chaque insertion : {items}",
        ),
        "Le tri par insertion garde une liste triée et y place un nombre à la fois. Après chaque insertion, la liste est :",
        "Dans l'ordre croissant : **{items}**.",
    ),
    "es": (
        (
            "Ordena estos números de menor a mayor con el método de inserción y muestra la lista después de cada inserción: {items}",
        ),
        "El método de inserción mantiene una lista ordenada y coloca en ella un número cada vez. Después de cada inserción la lista es:",
        "De menor a mayor: **{items}**.",
    ),
    "de": (
        (
            "Sortiere diese Zahlen aufsteigend mit Insertionsort und zeige die Liste nach jedem Einfügen: {items}",
        ),
        "Insertionsort hält eine sortierte Liste und fügt eine Zahl nach der anderen an ihrer Stelle ein. Nach jedem Einfügen lautet die Liste:",
        "Aufsteigend sortiert: **{items}**.",
    ),
    "nl": (
        (
            "Sorteer deze getallen oplopend met insertion sort en laat de lijst na elke invoeging zien: {items}",
        ),
        "Insertion sort houdt een gesorteerde lijst bij en zet er telkens één getal op zijn plaats in. Na elke invoeging is de lijst:",
        "Oplopend gesorteerd: **{items}**.",
    ),
}


def insertion_sort(rng: random.Random, language: str, budget: int) -> Draft:
    """Sort distinct numbers by insertion."""
    items: list[int] = []
    placed: list[int] = []

    def steps() -> Iterator[Step]:
        while len(items) < 45:
            item = rng.randrange(10, 1_000)
            if item in items:
                continue
            items.append(item)
            place = bisect.bisect(placed, item)
            if not placed:
                where = "the list is empty, so it simply goes in"
            elif place == 0:
                where = f"smaller than {placed[0]}, so it goes to the front"
            elif place == len(placed):
                where = f"larger than {placed[-1]}, so it goes to the end"
            else:
                where = f"larger than {placed[place - 1]} and smaller than {placed[place]}, so it goes between them"
            placed.insert(place, item)
            yield Step(
                f"Insert {item}: {where}. Position {place + 1} of {len(placed)}", ", ".join(map(str, placed))
            )

    taken = take(steps(), int(0.74 * budget) - 120)
    del items[len(taken) :]
    queries, opening, closing = _SORT[language]
    final = sorted(items)
    pairs = "; ".join(f"{low} < {high}" for low, high in pairwise(final))
    shown, ordered = ", ".join(map(str, items)), ", ".join(map(str, final))
    return Draft(
        rng.choice(queries).format(items=shown),
        reasoning(
            f"Sort {len(items)} numbers in ascending order by insertion: {shown}.",
            "Take the numbers from left to right. For each, find the first element of the sorted part that is larger and "
            "insert the number before it; the part to its left stays as it is.",
            [step.working for step in taken],
            f"Neighbours of the final list: {pairs}. All comparisons hold. It has {len(final)} elements, as many as were given.",
            language,
            f"Final order: {ordered}.",
            brief=budget < BRIEF,
        ),
        answer(opening, [step.result for step in taken], closing.format(items=ordered), numbered=True),
    )


_WORDS = (
    "aurora", "lumen", "terra", "orbis", "ventus", "flumen", "silva", "mons", "stella", "luna", "nubes", "ignis",
    "aqua", "radix", "arbor", "campus", "insula", "portus", "pons", "turris", "via", "hortus", "fons", "lapis",
    "mare", "caelum", "umbra", "tempus", "nox", "dies", "vox", "liber",
)  # fmt: skip
_CIPHER = {
    "en": (
        (
            "Encrypt the words {items} with a Caesar cipher: shift every letter {s} places forward in the alphabet a-z.",
            "caesar shift +{s} of these words please: {items}",
        ),
        "Every letter moves {s} places forward; after z the alphabet starts again at a.",
        "The encrypted text is **{text}**. Shifting every letter {s} places back restores the words.",
    ),
    "it": (
        (
            "Cifra le parole {items} con il cifrario di Cesare: sposta ogni lettera in avanti di {s} posti nell'alfabeto a-z.",
        ),
        "Ogni lettera avanza di {s} posti; dopo la z l'alfabeto ricomincia dalla a.",
        "Il testo cifrato è **{text}**. Spostando ogni lettera indietro di {s} posti si ritrovano le parole.",
    ),
    "pl": (
        (
            "Zaszyfruj słowa {items} szyfrem Cezara, przesuwając każdą literę w alfabecie a-z do przodu. Przesunięcie: {s}.",
        ),
        "Każdą literę przesuwamy do przodu (przesunięcie: {s}); po literze z alfabet zaczyna się znowu od a.",
        "Zaszyfrowany tekst to **{text}**. Takie samo przesunięcie wstecz ({s}) przywraca słowa.",
    ),
    "fr": (
        (
            "Chiffre les mots {items} avec le chiffre de César : décale chaque lettre de {s} rangs vers l'avant dans l'alphabet a-z.",
        ),
        "Chaque lettre avance de {s} rangs ; après z, l'alphabet recommence à a.",
        "Le texte chiffré est **{text}**. En reculant chaque lettre de {s} rangs, on retrouve les mots.",
    ),
    "es": (
        (
            "Cifra las palabras {items} con el cifrado César: desplaza cada letra {s} posiciones hacia delante en el alfabeto a-z.",
        ),
        "Cada letra avanza {s} posiciones; después de la z el alfabeto vuelve a empezar por la a.",
        "El texto cifrado es **{text}**. Al retroceder cada letra {s} posiciones se recuperan las palabras.",
    ),
    "de": (
        (
            "Verschlüssle die Wörter {items} mit der Caesar-Chiffre: Verschiebe jeden Buchstaben im Alphabet a-z um {s} Stellen nach vorn.",
        ),
        "Jeder Buchstabe rückt um {s} Stellen vor; nach z beginnt das Alphabet wieder bei a.",
        "Der verschlüsselte Text lautet **{text}**. Rückt man jeden Buchstaben um {s} Stellen zurück, erhält man die Wörter wieder.",
    ),
    "nl": (
        (
            "Versleutel de woorden {items} met de Caesarcode: schuif elke letter {s} plaatsen vooruit in het alfabet a-z.",
        ),
        "Elke letter schuift {s} plaatsen vooruit; na z begint het alfabet weer bij a.",
        "De versleutelde tekst is **{text}**. Schuif je elke letter {s} plaatsen terug, dan krijg je de woorden weer.",
    ),
}


def _shifted(letter: str, shift: int) -> str:
    return chr((ord(letter) - ord("a") + shift) % 26 + ord("a"))


def shifted_alphabet(rng: random.Random, language: str, budget: int) -> Draft:
    """Caesar cipher, letter by letter."""
    shift = rng.randrange(2, 25)
    words = list(_WORDS)
    rng.shuffle(words)
    encrypted: list[str] = []

    def steps() -> Iterator[Step]:
        for word in words:
            result = "".join(_shifted(letter, shift) for letter in word)
            encrypted.append(result)
            letters = ", ".join(f"{before}→{after}" for before, after in zip(word, result, strict=True))
            numbers = ", ".join(str(ord(letter) - ord("a")) for letter in word)
            yield Step(f"{word} ({numbers}): {letters}, so {result}", f"{word}: {letters}; **{result}**")

    taken = take(steps(), int(0.87 * budget) - 130, least=2)
    queries, opening, closing = _CIPHER[language]
    text = " ".join(encrypted[: len(taken)])
    listed = ", ".join(words[: len(taken)])
    return Draft(
        rng.choice(queries).format(items=listed, s=shift),
        reasoning(
            f"Caesar cipher with shift {shift} on {len(taken)} words: {listed}.",
            "Number the letters a = 0, b = 1, …, z = 25. Add the shift to each number; subtract 26 when the sum is above 25. "
            "Spaces separate the words and are not changed.",
            [step.working for step in taken],
            f"Shifting by {shift} and then by {26 - shift} moves every letter by 26 in all, which is no change, so the "
            f"result can be decrypted. Word lengths are kept.",
            language,
            f"Encrypted text: {text}",
            brief=budget < BRIEF,
        ),
        answer(opening.format(s=shift), [step.result for step in taken], closing.format(text=text, s=shift)),
    )


_NAMES = (
    "Ada", "Boris", "Clara", "Dario", "Elena", "Felix", "Greta", "Hugo", "Irena", "Jonas", "Karla", "Leon", "Mira",
    "Nils", "Olga", "Pavel", "Rosa", "Simon", "Tessa", "Viktor",
)  # fmt: skip
_RANKING = {
    "en": (
        (
            "{clues}. Who has the most points, and what is the full order?",
            "{clues}. Rank everyone by points.",
        ),
        "{a} has more points than {b}",
        "Putting the statements together gives one order, from most points to fewest:",
        "**{first}** has the most points and **{last}** the fewest. Every place follows from the statements:",
    ),
    "it": (
        ("{clues}. Chi ha più punti di tutti e qual è la classifica completa?",),
        "{a} ha più punti di {b}",
        "Mettendo insieme le affermazioni si ottiene un solo ordine, dal punteggio più alto al più basso:",
        "**{first}** ha il punteggio più alto e **{last}** il più basso. Ogni posizione segue dalle affermazioni:",
    ),
    "pl": (
        ("{clues}. Kto ma najwięcej punktów i jaka jest pełna kolejność?",),
        "{a} ma więcej punktów niż {b}",
        "Z podanych zdań wynika jedna kolejność, od największej do najmniejszej liczby punktów:",
        "Najwięcej punktów ma **{first}**, a najmniej **{last}**. Każde miejsce wynika z podanych zdań:",
    ),
    "fr": (
        ("{clues}. Qui a le plus de points, et quel est le classement complet ?",),
        "{a} a plus de points que {b}",
        "En réunissant les affirmations, on obtient un seul classement, du plus grand au plus petit nombre de points :",
        "**{first}** a le plus de points et **{last}** en a le moins. Chaque place découle des affirmations :",
    ),
    "es": (
        ("{clues}. ¿Quién tiene más puntos y cuál es la clasificación completa?",),
        "{a} tiene más puntos que {b}",
        "Al juntar las afirmaciones se obtiene un único orden, de más a menos puntos:",
        "**{first}** tiene la puntuación más alta y **{last}** la más baja. Cada puesto se deduce de las afirmaciones:",
    ),
    "de": (
        ("{clues}. Wer hat die meisten Punkte, und wie lautet die ganze Reihenfolge?",),
        "{a} hat mehr Punkte als {b}",
        "Aus den Aussagen ergibt sich genau eine Reihenfolge, von den meisten zu den wenigsten Punkten:",
        "**{first}** hat die meisten Punkte und **{last}** die wenigsten. Jeder Platz folgt aus den Aussagen:",
    ),
    "nl": (
        ("{clues}. Wie heeft de meeste punten, en wat is de volledige rangschikking?",),
        "{a} heeft meer punten dan {b}",
        "Uit de uitspraken volgt precies één volgorde, van de meeste naar de minste punten:",
        "**{first}** heeft de meeste punten en **{last}** de minste. Elke plaats volgt uit de uitspraken:",
    ),
}


def ranking(rng: random.Random, language: str, budget: int) -> Draft:
    """Return a total order from shuffled statements about neighbours and a few redundant ones."""
    count = max(4, min(12, (budget - 200) // 55))
    order = rng.sample(_NAMES, count)
    pairs = [(order[place], order[place + 1]) for place in range(count - 1)]
    for _ in range(rng.randrange(0, 3)):
        low, high = sorted(rng.sample(range(count), 2))
        if (order[low], order[high]) not in pairs:
            pairs.append((order[low], order[high]))
    rng.shuffle(pairs)
    queries, clue, opening, closing = _RANKING[language]
    clues = [clue.format(a=above, b=below) for above, below in pairs]
    remaining, working = list(pairs), []
    for place, name in enumerate(order, 1):
        says = "; ".join(f"{above} > {below}" for above, below in remaining if above == name) or "none"
        working.append(
            f"Place {place}: only {name} is not below anyone in the open statements, so {name} is next. Done with: {says}."
        )
        remaining = [pair for pair in remaining if name not in pair]
    chain = " > ".join(order)
    closing_lines = "\n".join(f"- {clue.format(a=above, b=below)}." for above, below in pairs)
    return Draft(
        rng.choice(queries).format(clues=". ".join(clues)),
        reasoning(
            f"{count} people and {len(pairs)} statements of the form 'X has more points than Y'. Find the order.",
            "Repeatedly look for the person whom no open statement places below somebody else, put that person next, and drop "
            "the statements in which they occur. Every step has exactly one candidate, so the order is unique.",
            working,
            f"The order is {chain}. Each of the {len(pairs)} statements compares someone with a person further down: "
            + "; ".join(
                f"{above} is at {order.index(above) + 1}, {below} at {order.index(below) + 1}"
                for above, below in pairs
            )
            + ".",
            language,
            f"First: {order[0]}. Last: {order[-1]}.",
            brief=budget < BRIEF,
        ),
        answer(
            opening,
            order,
            closing.format(first=order[0], last=order[-1]) + "\n\n" + closing_lines,
            numbered=True,
        ),
    )
