"""Problems about a text or a table that comes with the question."""
# ruff: noqa: E501 -- a sentence stays on one line, so that the languages can be compared

import random

from vpmoe_assets.generated.exercises.draft import BRIEF, Draft, answer, reasoning

_ITEMS = ("Alfa", "Beta", "Gamma", "Delta", "Omega", "Sigma", "Kappa", "Zeta")
_TABLE = {
    "en": (
        (
            "Here are sales figures per quarter:\n\n{table}\n\nWhat are the totals of every row and column, and which row is the best?",
            "{table}\n\nsum this up per row and per column please, and tell me which row wins",
        ),
        "The totals of the table are:",
        "column {c}",
        "The grand total is {total}. The best row is **{best}** with {most}, ahead of the weakest row ({worst}, {least}) by {gap}.",
    ),
    "it": (
        (
            "Ecco le vendite per trimestre:\n\n{table}\n\nQuali sono i totali di ogni riga e di ogni colonna, e qual è la riga migliore?",
        ),
        "I totali della tabella sono:",
        "colonna {c}",
        "Il totale complessivo è {total}. La riga migliore è **{best}** con {most}; la differenza rispetto alla riga più debole ({worst}, {least}) è {gap}.",
    ),
    "pl": (
        (
            "Oto sprzedaż w kwartałach:\n\n{table}\n\nJakie są sumy wierszy i kolumn i który wiersz jest najlepszy?",
        ),
        "Sumy w tabeli są następujące:",
        "kolumna {c}",
        "Suma całkowita wynosi {total}. Najlepszy wiersz to **{best}** ({most}); różnica względem najsłabszego wiersza ({worst}, {least}) wynosi {gap}.",
    ),
    "fr": (
        (
            "Voici les ventes par trimestre :\n\n{table}\n\nQuels sont les totaux de chaque ligne et de chaque colonne, et quelle ligne est la meilleure ?",
        ),
        "Les totaux du tableau sont :",
        "colonne {c}",
        "Le total général est {total}. La meilleure ligne est **{best}** avec {most}, soit {gap} de plus que la ligne la plus faible ({worst}, {least}).",
    ),
    "es": (
        (
            "Estas son las ventas por trimestre:\n\n{table}\n\n¿Cuáles son los totales de cada fila y de cada columna, y cuál es la mejor fila?",
        ),
        "Los totales de la tabla son:",
        "columna {c}",
        "El total general es {total}. La mejor fila es **{best}** con {most}, {gap} más que la fila más débil ({worst}, {least}).",
    ),
    "de": (
        (
            "Hier sind die Verkäufe je Quartal:\n\n{table}\n\nWie lauten die Summen jeder Zeile und jeder Spalte, und welche Zeile ist die beste?",
        ),
        "Die Summen der Tabelle sind:",
        "Spalte {c}",
        "Die Gesamtsumme ist {total}. Die beste Zeile ist **{best}** mit {most}, das sind {gap} mehr als in der schwächsten Zeile ({worst}, {least}).",
    ),
    "nl": (
        (
            "Hier zijn de verkopen per kwartaal:\n\n{table}\n\nWat zijn de totalen van elke rij en elke kolom, en welke rij is de beste?",
        ),
        "De totalen van de tabel zijn:",
        "kolom {c}",
        "Het eindtotaal is {total}. De beste rij is **{best}** met {most}, {gap} meer dan de zwakste rij ({worst}, {least}).",
    ),
}


def table(rng: random.Random, language: str, budget: int) -> Draft:
    """Row and column sums of a small table, computed twice."""
    columns = ("Q1", "Q2", "Q3", "Q4")
    count = max(2, min(6, (budget - 300) // 95))
    names = rng.sample(_ITEMS, count)
    while True:
        cells = [[rng.randrange(12, 990) for _ in columns] for _ in names]
        rows = [sum(row) for row in cells]
        if rows.count(max(rows)) == 1 and rows.count(min(rows)) == 1:
            break
    sums = [sum(column) for column in zip(*cells, strict=True)]
    total = sum(rows)
    header = "| | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns) + "\n"
    shown = header + "\n".join(
        f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in zip(names, cells, strict=True)
    )
    row_lines = [f"{name}: {_running(row)}" for name, row in zip(names, cells, strict=True)]
    column_lines = [
        f"{name}: {_running([row[place] for row in cells])}" for place, name in enumerate(columns)
    ]
    queries, opening, column_word, closing = _TABLE[language]
    best, worst = rows.index(max(rows)), rows.index(min(rows))
    results = [
        f"{name}: {' + '.join(map(str, row))} = {value}"
        for name, row, value in zip(names, cells, rows, strict=True)
    ] + [
        f"{column_word.format(c=name)}: {' + '.join(str(row[place]) for row in cells)} = {sums[place]}"
        for place, name in enumerate(columns)
    ]
    gap = f"{rows[best]} − {rows[worst]} = {rows[best] - rows[worst]}"
    order = sorted(range(count), key=lambda place: -rows[place])
    ranked = " > ".join(f"{names[place]} ({rows[place]})" for place in order)
    return Draft(
        rng.choice(queries).format(table=shown),
        reasoning(
            f"A table of {count} rows and {len(columns)} columns, {count} × {len(columns)} = {count * len(columns)} cells. Wanted: row "
            "totals, column totals, the best row.",
            "Add along each row, then along each column. Both ways of adding must lead to the same grand total, which is a "
            "check that catches most slips.",
            ["Rows:", *row_lines, "Columns:", *column_lines],
            f"Rows together: {' + '.join(map(str, rows))} = {total}. Columns together: {' + '.join(map(str, sums))} = {total}. "
            "Both agree.",
            language,
            f"Order of the rows: {ranked}. Gap between best and weakest: {gap}.",
            brief=budget < BRIEF,
        ),
        answer(
            opening,
            results,
            closing.format(
                total=total, best=names[best], most=rows[best], worst=names[worst], least=rows[worst],
                gap=rows[best] - rows[worst],
            ),
        ),
    )  # fmt: skip


def _running(values: list[int]) -> str:
    parts, total = [], values[0]
    for value in values[1:]:
        parts.append(f"{total} + {value} = {total + value}")
        total += value
    return ", ".join(parts)


_PLACES = (
    "Albora",
    "Corvana",
    "Delmira",
    "Estaro",
    "Fontela",
    "Garvia",
    "Isolde",
    "Lumeria",
    "Montero",
    "Velmar",
)
_FACTS = {
    "en": (
        (
            "Extract every fact from this text as a list of label and value:\n\n{text}",
            "pull the key figures out of this paragraph:\n\n{text}",
        ),
        (
            ("Name", "This is a note about the library of {place}."),
            ("Opening year", "It opened its doors in {year}."),
            ("Books", "Its shelves hold {books} books."),
            ("Reading seats", "Visitors find {seats} reading seats."),
            ("Staff", "The staff numbers {staff}."),
            ("Closing time", "On weekdays it closes at {hour}:00."),
        ),
        "The text states the following facts:",
        "In short: the library of {place} dates from {year} and has {books} books and {seats} seats, which is about {ratio} books per seat.",
    ),
    "it": (
        ("Estrai da questo testo tutti i fatti come elenco di etichetta e valore:\n\n{text}",),
        (
            ("Nome", "Questa è una nota sulla biblioteca di {place}."),
            ("Anno di apertura", "Ha aperto nel {year}."),
            ("Libri", "Gli scaffali contengono {books} libri."),
            ("Posti di lettura", "I posti di lettura sono {seats}."),
            ("Personale", "Le persone che ci lavorano sono {staff}."),
            ("Orario di chiusura", "Nei giorni feriali chiude alle {hour}:00."),
        ),
        "Il testo riporta questi fatti:",
        "In breve: la biblioteca di {place} esiste dal {year} e ha {books} libri e {seats} posti, cioè circa {ratio} libri per posto.",
    ),
    "pl": (
        ("Wypisz z tego tekstu wszystkie fakty w postaci listy: etykieta i wartość.\n\n{text}",),
        (
            ("Nazwa", "To notatka o bibliotece w miejscowości {place}."),
            ("Rok otwarcia", "Otwarto ją w roku {year}."),
            ("Liczba książek", "Liczba książek na półkach: {books}."),
            ("Miejsca do czytania", "Liczba miejsc do czytania: {seats}."),
            ("Personel", "Liczba pracowników: {staff}."),
            ("Godzina zamknięcia", "W dni robocze zamyka się ją o {hour}:00."),
        ),
        "Tekst podaje następujące fakty:",
        "W skrócie: biblioteka w miejscowości {place} działa od roku {year}; liczba książek to {books}, liczba miejsc to {seats}, a więc na jedno miejsce przypada około {ratio} książek.",
    ),
    "fr": (
        ("Relève tous les faits de ce texte sous forme de liste (libellé et valeur) :\n\n{text}",),
        (
            ("Nom", "Voici une note sur la bibliothèque de {place}."),
            ("Année d'ouverture", "Elle a ouvert en {year}."),
            ("Livres", "Ses rayons contiennent {books} livres."),
            ("Places de lecture", "On y trouve {seats} places de lecture."),
            ("Personnel", "L'équipe compte {staff} personnes."),
            ("Heure de fermeture", "En semaine, elle ferme à {hour} h."),
        ),
        "Le texte donne les faits suivants :",
        "En bref : la bibliothèque de {place} existe depuis {year} et compte {books} livres et {seats} places, soit environ {ratio} livres par place.",
    ),
    "es": (
        ("Extrae todos los datos de este texto como una lista de etiqueta y valor:\n\n{text}",),
        (
            ("Nombre", "Esta es una nota sobre la biblioteca de {place}."),
            ("Año de apertura", "Abrió sus puertas en {year}."),
            ("Libros", "En sus estanterías hay {books} libros."),
            ("Plazas de lectura", "Dispone de {seats} plazas de lectura."),
            ("Personal", "En ella trabajan {staff} personas."),
            ("Hora de cierre", "Entre semana cierra a las {hour}:00."),
        ),
        "El texto contiene estos datos:",
        "En resumen: la biblioteca de {place} existe desde {year} y tiene {books} libros y {seats} plazas, es decir, unos {ratio} libros por plaza.",
    ),
    "de": (
        ("Entnimm diesem Text alle Angaben als Liste aus Bezeichnung und Wert:\n\n{text}",),
        (
            ("Name", "Dies ist eine Notiz über die Bibliothek von {place}."),
            ("Eröffnungsjahr", "Sie wurde im Jahr {year} eröffnet."),
            ("Bücher", "In ihren Regalen stehen {books} Bücher."),
            ("Leseplätze", "Es gibt {seats} Leseplätze."),
            ("Personal", "Dort arbeiten {staff} Personen."),
            ("Schließzeit", "An Werktagen schließt sie um {hour} Uhr."),
        ),
        "Der Text enthält diese Angaben:",
        "Kurz gesagt: Die Bibliothek von {place} besteht seit {year} und hat {books} Bücher und {seats} Plätze, also etwa {ratio} Bücher je Platz.",
    ),
    "nl": (
        ("Haal alle feiten uit deze tekst als lijst van naam en waarde:\n\n{text}",),
        (
            ("Naam", "Dit is een notitie over de bibliotheek van {place}."),
            ("Openingsjaar", "Ze ging open in {year}."),
            ("Boeken", "Op de planken staan {books} boeken."),
            ("Leesplaatsen", "Er zijn {seats} leesplaatsen."),
            ("Personeel", "Er werken {staff} mensen."),
            ("Sluitingstijd", "Op werkdagen sluit ze om {hour}:00 uur."),
        ),
        "De tekst geeft deze feiten:",
        "Kortom: de bibliotheek van {place} bestaat sinds {year} en heeft {books} boeken en {seats} plaatsen, dus ongeveer {ratio} boeken per plaats.",
    ),
}
_KEYS = ("place", "year", "books", "seats", "staff", "hour")


def facts(rng: random.Random, language: str, budget: int) -> Draft:
    """Label and value of every sentence of a short notice, and one figure derived from two of them."""
    seats = rng.randrange(24, 400)
    ratio = rng.randrange(40, 300)
    values: dict[str, object] = {
        "place": rng.choice(_PLACES),
        "year": rng.randrange(1850, 2020),
        "books": seats * ratio + rng.randrange(1, (seats - 1) // 2),
        "seats": seats,
        "staff": rng.randrange(5, 60),
        "hour": rng.randrange(16, 22),
    }
    values["ratio"] = ratio
    queries, sentences, opening, closing = _FACTS[language]
    keyed = list(zip(_KEYS, sentences, strict=True))
    tail = keyed[1:]
    rng.shuffle(tail)
    keyed = [keyed[0], *tail]
    text = " ".join(sentence.format(**values) for _, (_, sentence) in keyed)
    working = [
        f'Sentence {place}: "{sentence.format(**values)}" It states one thing, the {key}: {values[key]}.'
        for place, (key, (_, sentence)) in enumerate(keyed, 1)
    ]
    books = int(str(values["books"]))
    return Draft(
        rng.choice(queries).format(text=text),
        reasoning(
            f"A notice of {len(keyed)} sentences. Wanted: every stated fact as label and value, nothing that the text does not say.",
            "Go through the sentences in order, take one label and one value from each, keep numbers as written. Then look for "
            "a figure that follows from the stated ones and helps the reader.",
            working,
            f"{len(keyed)} sentences, {len(keyed)} facts. Derived figure, books per seat: {seats} × {ratio} = {seats * ratio}, and "
            f"{books} − {seats * ratio} = {books - seats * ratio}, less than half of {seats}, so the quotient rounds to {ratio}. The text "
            "does not say how many people visit, so no visitor figure may appear.",
            language,
            f"List the facts in the order of the text and end with the ratio {ratio}.",
            brief=budget < BRIEF,
        ),
        answer(opening, [f"{label}: {values[key]}" for key, (label, _) in keyed], closing.format(**values)),
    )
