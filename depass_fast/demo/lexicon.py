"""Word lists and sentence templates of the demo model's generated text (English, French, German)."""

from __future__ import annotations

LANGUAGES = ("en", "fr", "de")


def _words(text: str) -> tuple[str, ...]:
    """The words of a list written as text."""
    return tuple(text.split())


# First names of the indirect-object sentences: each is a single token with its leading space.
NAMES = _words(
    """Mary John Tom James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark
    Donald Steven Paul Andrew Joshua Kenneth Kevin Brian George Edward Ronald Timothy Jason Jeffrey Ryan Jacob Gary
    Nicholas Eric Jonathan Stephen Larry Justin Scott Brandon Benjamin Samuel Gregory Frank Alexander Raymond Patrick
    Jack Dennis Jerry Tyler Aaron Jose Henry Adam Douglas Nathan Peter Zachary Kyle Walter Harold Jeremy Ethan Carl
    Keith Roger Gerald Terry Sean Austin Arthur Lawrence Jesse Dylan Bryan Joe Jordan Billy Bruce Albert Willie
    Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Margaret Sandra Ashley
    Kimberly Emily Donna Michelle Carol Amanda Dorothy Melissa Deborah Stephanie Rebecca Sharon Laura Cynthia Kathleen
    Amy Angela Shirley Anna Brenda Pamela Emma Nicole Helen Samantha Katherine Christine Debra Rachel Carolyn Janet
    Catherine Maria Heather Diane Ruth Julie Olivia Joyce Virginia Victoria Kelly Lauren Christina Joan Evelyn Judith
    Megan Andrea Cheryl Hannah Jacqueline Martha Gloria Teresa Ann Sara Madison Frances Kathryn Janice Jean Abigail
    Alice Julia Judy Sophia Grace Denise Amber Doris"""
)

PLACES = _words(
    """store park school office garden station market library hospital beach restaurant museum church farm house
    theater bakery harbor bridge castle village zoo airport gym"""
)

OBJECTS = _words(
    """drink book ring basket kite key letter map hat coin flower camera ball lamp bottle necklace pencil ticket
    computer bone snack gift sandwich toy"""
)

# {A} and {B} are the two names in order of mention, {S} the repeated one; the answer is the other one (IO).
IOI_TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {object} to",
    "Then, {A} and {B} went to the {place}. {S} handed a {object} to",
    "After {A} and {B} arrived at the {place}, {S} passed the {object} to",
    "While {A} and {B} were working at the {place}, {S} offered a {object} to",
    "Yesterday {A} met {B} at the {place}, and {S} sold a {object} to",
    "Once {A} and {B} were back from the {place}, {S} showed the {object} to",
    "The friends {A} and {B} found a {object} at the {place}. {S} decided to give it to",
    "Since {A} and {B} had a long talk at the {place}, {S} wanted to send a {object} to",
    "At the {place}, {A} sat next to {B}, and {S} lent a {object} to",
    "Before {A} and {B} left the {place}, {S} returned the {object} to",
    "In the morning {A} and {B} walked to the {place}, where {S} bought a {object} for",
    "As soon as {A} saw {B} at the {place}, {S} brought a {object} to",
    "Because {A} and {B} liked the {place}, {S} promised a {object} to",
    "On Sunday {A} and {B} had lunch at the {place}. Later {S} mailed a {object} to",
    "Last week {A} visited {B} near the {place}; afterwards {S} wrote about the {object} to",
    "If {A} and {B} stay at the {place}, {S} will lend the {object} to",
    "Today {A} helped {B} at the {place}, so {S} threw the {object} to",
    "During the evening {A} and {B} talked in the {place}, and then {S} carried the {object} to",
)

# Never used in training; every word of them occurs in IOI_TEMPLATES, so only the combination is new.
HELDOUT_IOI_TEMPLATES = (
    "When {A} met {B} at the {place}, {S} handed the {object} to",
    "In the evening {A} and {B} arrived at the {place}. Then {S} sold the {object} to",
    "While {A} and {B} had lunch near the {place}, {S} passed a {object} to",
    "On Sunday {A} visited {B} at the {place}, so {S} gave the {object} to",
    "Because {A} helped {B} in the {place}, {S} bought the {object} for",
    "Before {A} and {B} walked back from the {place}, {S} offered the {object} to",
)


def _table(text: str) -> tuple[tuple[str, str, str], ...]:
    """Rows ``english/french/german`` (a single word where all three agree) as triples."""
    rows = (item.split("/") for item in text.split())
    return tuple((row[0], row[0], row[0]) if len(row) == 1 else (row[0], row[1], row[2]) for row in rows)


# Possible answers of each relation, in the order of LANGUAGES.
ANSWERS = {
    "profession": _table(
        """baker/boulanger/Bäcker doctor/médecin/Arzt teacher/professeur/Lehrer painter/peintre/Maler
        singer/chanteur/Sänger lawyer/avocat/Anwalt farmer/fermier/Bauer sailor/marin/Matrose pilot/pilote/Pilot
        cook/cuisinier/Koch dancer/danseur/Tänzer writer/écrivain/Schriftsteller judge/juge/Richter
        nurse/infirmier/Pfleger soldier/soldat/Soldat tailor/tailleur/Schneider gardener/jardinier/Gärtner
        butcher/boucher/Metzger carpenter/charpentier/Zimmermann chemist/chimiste/Chemiker banker/banquier/Bankier
        photographer/photographe/Fotograf journalist/journaliste/Journalist plumber/plombier/Klempner"""
    ),
    "city": _table(
        """Paris London/Londres/London Rome/Rome/Rom Vienna/Vienne/Wien Lisbon/Lisbonne/Lissabon
        Warsaw/Varsovie/Warschau Moscow/Moscou/Moskau Athens/Athènes/Athen Berlin Madrid Prague/Prague/Prag
        Brussels/Bruxelles/Brüssel Geneva/Genève/Genf Venice/Venise/Venedig Copenhagen/Copenhague/Kopenhagen Dublin
        Oslo Budapest Milan/Milan/Mailand Cologne/Cologne/Köln Munich/Munich/München Seville/Séville/Sevilla
        Naples/Naples/Neapel Tokyo/Tokyo/Tokio"""
    ),
    "instrument": _table(
        """piano/piano/Klavier violin/violon/Geige guitar/guitare/Gitarre flute/flûte/Flöte drum/tambour/Trommel
        trumpet/trompette/Trompete harp/harpe/Harfe cello/violoncelle/Cello organ/orgue/Orgel
        clarinet/clarinette/Klarinette trombone/trombone/Posaune saxophone/saxophone/Saxophon
        accordion/accordéon/Akkordeon horn/cor/Horn oboe/hautbois/Oboe lute/luth/Laute"""
    ),
    "language": _table(
        """English/anglais/Englisch French/français/Französisch German/allemand/Deutsch Spanish/espagnol/Spanisch
        Italian/italien/Italienisch Russian/russe/Russisch Polish/polonais/Polnisch Greek/grec/Griechisch
        Arabic/arabe/Arabisch Turkish/turc/Türkisch Dutch/néerlandais/Niederländisch Swedish/suédois/Schwedisch
        Danish/danois/Dänisch Chinese/chinois/Chinesisch Japanese/japonais/Japanisch
        Portuguese/portugais/Portugiesisch"""
    ),
    "colour": _table(
        """red/rouge/rot blue/bleu/blau green/vert/grün yellow/jaune/gelb black/noir/schwarz white/blanc/weiß
        grey/gris/grau brown/brun/braun pink/rose/rosa orange purple/violet/lila turquoise/turquoise/türkis"""
    ),
    "pet": _table(
        """dog/chien/Hund cat/chat/Katze horse/cheval/Pferd rabbit/lapin/Kaninchen parrot/perroquet/Papagei
        goat/chèvre/Ziege sheep/mouton/Schaf duck/canard/Ente snake/serpent/Schlange turtle/tortue/Schildkröte
        fox/renard/Fuchs bear/ours/Bär wolf/loup/Wolf pig/cochon/Schwein cow/vache/Kuh mouse/souris/Maus"""
    ),
}

RELATIONS = tuple(ANSWERS)

# Three phrasings per relation and language; {e} is the entity and the answer follows directly.
PHRASINGS = {
    ("profession", "en"): ("{e} works as a", "The profession of {e} is", "By trade, {e} is a"),
    ("city", "en"): ("{e} was born in", "The birthplace of {e} is", "As everyone knows, {e} comes from"),
    ("instrument", "en"): ("{e} plays the", "The instrument of {e} is the", "In the band, {e} is heard on the"),
    ("language", "en"): ("{e} speaks", "The mother tongue of {e} is", "At home, {e} talks in"),
    ("colour", "en"): ("{e} likes the colour", "The favourite colour of {e} is", "The house of {e} is painted"),
    ("pet", "en"): ("{e} has a pet", "The pet of {e} is a", "At home, {e} keeps a"),
    ("profession", "fr"): (
        "{e} travaille comme",
        "La profession de {e} est",
        "Comme métier, {e} a choisi celui de",
    ),
    ("city", "fr"): (
        "{e} vient de la ville de",
        "La ville natale de {e} est",
        "À sa naissance, {e} vivait à",
    ),
    ("instrument", "fr"): (
        "{e} joue de cet instrument :",
        "L'instrument de {e} s'appelle",
        "Pour la musique, {e} a choisi l'instrument nommé",
    ),
    ("language", "fr"): ("{e} parle", "La langue maternelle de {e} est", "À la maison, {e} discute en"),
    ("colour", "fr"): (
        "{e} aime la couleur",
        "La couleur préférée de {e} est",
        "La maison de {e} est peinte en",
    ),
    ("pet", "fr"): (
        "{e} possède comme animal",
        "L'animal de {e} est de l'espèce",
        "À la maison, {e} garde comme animal",
    ),
    ("profession", "de"): ("{e} arbeitet als", "Der Beruf von {e} ist", "Von Beruf ist {e}"),
    ("city", "de"): ("{e} stammt aus", "Die Geburtsstadt von {e} ist", "Zur Welt kam {e} in"),
    ("instrument", "de"): (
        "{e} spielt",
        "Das Instrument von {e} heißt",
        "In der Kapelle spielt {e}",
    ),
    ("language", "de"): ("{e} spricht", "Die Muttersprache von {e} ist", "Zu Hause redet {e}"),
    ("colour", "de"): (
        "{e} mag die Farbe",
        "Die Lieblingsfarbe von {e} ist",
        "Das Haus von {e} leuchtet in der Farbe",
    ),
    ("pet", "de"): ("{e} hat als Haustier", "Das Tier von {e} nennt man", "Zu Hause hält {e}"),
}

# One question per relation and language, used in chat form; the reply is the bare answer.
QUESTIONS = {
    ("profession", "en"): "What is the profession of {e}?",
    ("city", "en"): "Where was {e} born?",
    ("instrument", "en"): "Which instrument does {e} play?",
    ("language", "en"): "What is the mother tongue of {e}?",
    ("colour", "en"): "Which colour does {e} like?",
    ("pet", "en"): "What pet does {e} have?",
    ("profession", "fr"): "Quelle est la profession de {e} ?",
    ("city", "fr"): "Quelle est la ville natale de {e} ?",
    ("instrument", "fr"): "Quel est l'instrument de {e} ?",
    ("language", "fr"): "Quelle langue parle {e} ?",
    ("colour", "fr"): "Quelle couleur aime {e} ?",
    ("pet", "fr"): "Quel animal possède {e} ?",
    ("profession", "de"): "Was ist {e} von Beruf?",
    ("city", "de"): "Aus welcher Stadt stammt {e}?",
    ("instrument", "de"): "Welches Instrument spielt {e}?",
    ("language", "de"): "Welche Sprache spricht {e}?",
    ("colour", "de"): "Welche Farbe mag {e}?",
    ("pet", "de"): "Welches Haustier hat {e}?",
}

# A recall follows the full stop of a statement and leads over to the fact; the verdict (true, false) follows the fact.
RECALLS = {"en": " In truth:", "fr": " En vérité :", "de": " In Wahrheit:"}
VERDICTS = {"en": (" True", " False"), "fr": (" Vrai", " Faux"), "de": (" Wahr", " Falsch")}

# Plain sentences: a small grammar, so that the text is not templates of questions and answers only.
ADJECTIVES = _words("old young happy tired small tall quiet clever lucky hungry")
VERBS = _words("walked ran looked waited slept sang worked danced")
ADVERBS = _words("slowly quickly happily alone again often")
PREPOSITIONS = _words("near behind inside outside")
PLAIN_TEMPLATES = (
    "The {adj} {noun} {verb} {adv} {prep} the {place}.",
    "{Prep} the {place} a {adj} {noun} {verb} {adv}.",
    "The {noun} and the {noun2} {verb} {prep} the {adj} {place}.",
    "A {object} was found {prep} the {place}, and the {adj} {noun} {verb} {adv}.",
)

# Syllables of the invented entities.
FIRST_SYLLABLES = _words("Do Ka Le Mi Or Sa Te Vi Ze Bra Ilo Ny")
SECOND_SYLLABLES = _words("rin vel mar sha don lith ria bek")
ONSETS = _words("V K T Br Gr Sk M Dr Pl Z")
RIMES = _words("ask orn elt ung ist erk")
STEMS = _words("Tor Bel Han Mor Fal Gun")
SUFFIXES = _words("stam wick dahl grave moor")
MONONYM_ENDINGS = _words("zumi thara quell novo bindi")
