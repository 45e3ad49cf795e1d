"""Captions of the phantoms: worded as in open-access case reports, never taken from one.

A caption may name the examination, the finding, its place, size and patient, each in many ways and each left out at
random; it also tells what no picture shows (history, histology, follow-up). Common wordings come first in every tuple
and are chosen by Zipf's law.
"""

import re

import numpy as np

from .phantom_cases import Case, zipf_index


# How a zone is put into words, from usual to rare.
ZONES: dict[str, tuple[str, ...]] = {
    "upper": ("upper lobe", "upper zone", "apex", "upper lung field", "suprahilar region"),
    "middle": ("mid zone", "perihilar region", "mid lung", "hilum"),
    "lower": ("lower lobe", "lower zone", "lung base", "lower lung field", "basal segments"),
    "anterior": ("anterior segment", "anterior lung", "upper lobe", "subpleural anterior lung"),
    "posterior": ("posterior segment", "lower lobe", "dependent lung", "superior segment"),
    "frontal": ("frontal lobe", "frontal region", "frontal white matter", "anterior cranial fossa"),
    "parietal": ("parietal lobe", "temporoparietal region", "centrum semiovale", "convexity"),
    "occipital": ("occipital lobe", "occipital region", "PCA territory", "posterior cortex"),
    "deep": ("basal ganglia", "thalamus", "putamen", "deep gray matter", "internal capsule"),
    "outer": ("upper outer quadrant", "lateral breast", "axillary tail", "outer half"),
    "inner": ("inner quadrant", "lower inner quadrant", "medial breast"),
    "central": ("retroareolar region", "subareolar region", "central breast"),
    "upper pole": ("upper pole", "superior pole", "upper third"),
    "interpolar": ("interpolar region", "mid kidney", "midpole"),
    "lower pole": ("lower pole", "inferior pole", "lower calyx"),
    "dome": ("segment VIII", "segment VII", "dome of the liver"),
    "hilum": ("segment IV", "porta hepatis", "segment V", "hepatic hilum"),
    "inferior": ("segment VI", "inferior liver", "subcapsular liver"),
}

_EXAMINATION: dict[str, tuple[str, ...]] = {
    "chest radiograph": (
        "chest X-ray",
        "chest radiograph",
        "CXR",
        "plain chest film",
        "chest x ray",
        "thoracic radiograph",
        "X-ray of the chest",
        "chest roentgenogram",
        "plain radiograph",
        "radiography of the thorax",
    ),
    "chest CT": (
        "chest CT",
        "CT of the chest",
        "computed tomography",
        "CT scan",
        "thoracic CT",
        "chest computed tomography scan",
        "HRCT",
        "contrast-enhanced CT",
        "CECT thorax",
        "CT image",
        "multidetector CT",
    ),
    "brain MR": (
        "brain MRI",
        "MRI",
        "magnetic resonance imaging",
        "MRI of the brain",
        "MR image",
        "cranial MRI",
        "brain magnetic resonance imaging",
        "head MRI",
        "MRI scan",
        "cerebral MR imaging",
    ),
    "ultrasound": (
        "ultrasound",
        "abdominal ultrasound",
        "ultrasonography",
        "sonogram",
        "US image",
        "abdominal sonography",
        "gray-scale ultrasound image",
        "B-mode image",
        "ultrasound scan",
        "point-of-care ultrasound",
    ),
    "mammogram": (
        "mammogram",
        "mammography",
        "digital mammogram",
        "mammographic image",
        "screening mammogram",
        "diagnostic mammography",
        "X-ray mammography",
        "breast imaging",
    ),
}
_VIEW: dict[str, tuple[str, ...]] = {
    "PA": ("PA", "posteroanterior", "frontal", "erect PA"),
    "AP": ("AP", "anteroposterior", "portable", "supine", "bedside"),
    "lateral": ("lateral", "left lateral", "profile"),
    "lung window": ("axial", "lung window", "axial lung window", "transverse"),
    "mediastinal window": (
        "axial",
        "mediastinal window",
        "contrast-enhanced axial",
        "transverse",
        "soft-tissue window",
    ),
    "axial T2": ("axial T2-weighted", "T2", "T2WI", "axial", "transverse T2"),
    "axial FLAIR": ("axial FLAIR", "FLAIR", "fluid-attenuated inversion recovery", "axial"),
    "axial T1 contrast": ("post-contrast T1", "axial T1 with gadolinium", "gadolinium-enhanced", "axial", "T1+C"),
    "axial DWI": ("diffusion-weighted", "DWI", "axial DWI", "b1000"),
    "coronal T1 contrast": ("coronal post-contrast T1", "coronal", "coronal contrast-enhanced"),
    "sagittal T1": ("sagittal T1", "sagittal", "midsagittal T1-weighted"),
    "axial T1": ("T1-weighted", "axial T1", "unenhanced T1", "axial"),
    "coronal T2": ("coronal T2", "coronal", "coronal T2-weighted"),
    "gray scale": ("longitudinal", "transverse", "gray-scale", "transabdominal"),
    "gray scale oblique": ("oblique", "subcostal", "intercostal", "sagittal"),
    "CC": ("craniocaudal", "CC", "cranio-caudal"),
    "MLO": ("mediolateral oblique", "MLO", "oblique"),
}
_SHOWS = (
    "showing",
    "shows",
    "demonstrating",
    "revealed",
    "with",
    "reveals",
    "demonstrates",
    "showed",
    "depicting",
    "demonstrated",
    "indicating",
    "suggestive of",
    "consistent with",
    "illustrating",
    "confirming",
    "suspicious for",
)
_WHEN = (
    "on admission",
    "at presentation",
    "before treatment",
    "on follow-up",
    "after treatment",
    "at 6 months",
    "preoperatively",
    "on day 3",
    "after surgery",
    "one year later",
    "at the time of diagnosis",
    "at relapse",
    "2 weeks after discharge",
    "three months after the first dose",
    "in the second week",
    "before biopsy",
    "on arrival",
    "in the ICU",
)
_SYMPTOM: dict[str, tuple[str, ...]] = {
    "chest": (
        "dyspnoea",
        "cough",
        "fever",
        "chest pain",
        "haemoptysis",
        "weight loss",
        "night sweats",
        "a history of smoking",
        "tuberculosis",
        "lupus",
        "syncope",
        "HIV infection",
        "asthma",
        "rheumatoid arthritis",
        "a recent flight",
        "stridor",
        "hoarseness",
        "leukaemia",
        "a stab wound",
        "silica exposure",
    ),
    "brain MR": (
        "headache",
        "seizures",
        "hemiparesis",
        "confusion",
        "vomiting",
        "visual loss",
        "aphasia",
        "ataxia",
        "dementia",
        "diabetes",
        "vertigo",
        "head injury",
        "diplopia",
        "hypertension",
        "breast cancer",
        "gait disturbance",
        "psychosis",
    ),
    "ultrasound": (
        "right upper quadrant pain",
        "abdominal pain",
        "jaundice",
        "flank pain",
        "haematuria",
        "fever",
        "weight loss",
        "abnormal liver tests",
        "renal failure",
        "hepatitis C",
        "pregnancy",
        "sickle cell disease",
        "alcohol abuse",
    ),
    "mammogram": (
        "a palpable lump",
        "nipple discharge",
        "screening recall",
        "breast pain",
        "a BRCA1 mutation",
        "skin dimpling",
        "a family history of breast cancer",
        "previous lumpectomy",
        "gynaecomastia",
        "lymphoma",
        "axillary swelling",
    ),
}
_ASIDES = (
    "The patient recovered uneventfully",
    "Written consent was obtained",
    "Slice thickness 5 mm",
    "Case 2",
    "Patient 4",
    "No other abnormality was found",
    "The lesion was resected",
    "See text for details",
    "Courtesy of a colleague",
    "Surgery was declined",
    "Laboratory tests were normal",
    "The patient was lost to follow-up",
    "The scale is in centimetres",
    "Image quality is limited",
    "Findings were confirmed at autopsy",
    "Chemotherapy was started",
    "Scale bar 1 cm",
    "Steroids were given",
    "No fracture was seen",
    "The family history was unremarkable",
)
_FIGURES = (
    "(arrow)",
    "(arrows)",
    "(white arrow)",
    "(arrowhead)",
    "(a)",
    "(*)",
    "(red arrow)",
    "(circle)",
    "(black arrow)",
)
# How big a lesion is, and how bad a thing without edges is.
_LESION_GRADE: dict[str, tuple[str, ...]] = {
    "small": ("small", "tiny", "subtle", "minute"),
    "moderate": ("moderate-sized", "medium-sized", "sizeable"),
    "large": ("large", "huge", "bulky", "giant"),
}
_DIFFUSE_GRADE: dict[str, tuple[str, ...]] = {
    "small": ("mild", "small", "minimal", "subtle"),
    "moderate": ("moderate", "marked", "evident"),
    "large": ("severe", "massive", "large", "extensive"),
}


def write_caption(case: Case, view: str, rng: np.random.Generator) -> str:
    """Word one caption of a case whose first picture is a `view`; never empty."""
    finding = _finding(case, rng)
    examination = _examination(case, view, rng)
    style = rng.random()
    if style < 0.07:
        parts = [_patient(case, rng) + _maybe(rng, 0.7, " " + _choose(rng, _WHEN))]  # nothing that can be seen
    elif style < 0.12:
        parts = [examination + _maybe(rng, 0.5, " " + _choose(rng, _WHEN))]
    elif style < 0.32:
        parts = [finding]
    elif style < 0.42:
        seen = _choose(rng, ("is seen", "is noted", "is visible", "was found", "can be appreciated", "was diagnosed"))
        parts = [finding + " " + seen + _maybe(rng, 0.4, " on " + examination)]
    elif style < 0.62:
        shows = _choose(rng, _SHOWS)
        parts = [_patient(case, rng), f"{examination} {shows} {finding}"]
    elif style < 0.70:
        parts = [f"{finding} in {_patient(case, rng)}"]
    elif style < 0.78:
        parts = [f"{examination} {_choose(rng, _WHEN)}", finding]
    else:
        patient = _maybe(rng, 0.2, f" of {_patient(case, rng)}")
        when = _maybe(rng, 0.15, " " + _choose(rng, _WHEN))
        parts = [f"{examination}{patient}{when} {_choose(rng, _SHOWS)} {finding}"]
    for chance, sentences in ((0.5, case.finding.details), (0.35, _ASIDES), (0.15, _ASIDES)):
        if sentences and rng.random() < chance:
            parts.append(_choose(rng, sentences, 0.6))
    return _join(parts, rng)


def _finding(case: Case, rng: np.random.Generator) -> str:
    """Noun phrase of the finding with whatever of grade, side, zone, size and figure mark is not left out."""
    words = _choose(rng, case.finding.names, 0.3)
    if not case.size_word:
        return words + _maybe(rng, 0.3, f" on the {case.side} side" if case.side else "")
    article, noun = words.split(" ", 1) if words.startswith(("a ", "an ")) else ("", words)
    before, behind = _place(case, rng)
    grade = ""
    if article and case.finding.family != "other" and rng.random() < 0.35:
        grade = _choose(rng, (_LESION_GRADE if case.finding.millimetres[1] else _DIFFUSE_GRADE)[case.size_word]) + " "
    smallest, largest = case.finding.millimetres
    measure = ""
    if largest and rng.random() < 0.35:
        measure = _measure(smallest + case.size * (largest - smallest), rng)
    noun = grade + before + noun
    if measure and article and rng.random() < 0.5:
        noun = f"{measure} {noun}"
    elif measure:
        behind += " measuring " + measure
    if article:
        article = "an " if re.match(r"[aeiou]|8|1[18](?!\d)", noun.lower()) else "a "
    return _maybe(rng, 0.8, article) + noun + behind + _maybe(rng, 0.25, " " + _choose(rng, _FIGURES))


def _place(case: Case, rng: np.random.Generator) -> tuple[str, str]:
    """Words for side and zone, to go before and behind the noun; both may be empty."""
    side = case.side if rng.random() < 0.85 else ""
    if case.zone and rng.random() < 0.6 and side != "bilateral":
        return "", " in the " + (side + " " + _choose(rng, ZONES[case.zone])).strip()
    if not side:
        return "", ""
    if rng.random() < 0.6:
        return side + ("-sided " if side != "bilateral" and rng.random() < 0.3 else " "), ""
    return "", " on both sides" if side == "bilateral" else f" on the {side}"


def _measure(millimetres: float, rng: np.random.Generator) -> str:
    other = millimetres * rng.uniform(0.65, 1.0)
    style = rng.random()
    if style < 0.4:
        return f"{millimetres / 10:.1f} cm"
    if style < 0.7:
        return f"{millimetres:.0f} mm"
    return f"{millimetres / 10:.1f} × {other / 10:.1f} cm" if style < 0.9 else f"{millimetres:.0f}x{other:.0f} mm"


def _examination(case: Case, view: str, rng: np.random.Generator) -> str:
    name = _choose(rng, _EXAMINATION[case.modality], 0.5)
    if rng.random() < 0.65:
        words = _choose(rng, _VIEW[view], 0.7)
        name = f"{name}, {words} view" if rng.random() < 0.15 else f"{words} {name}"
    if case.modality == "mammogram" and case.side in ("right", "left") and rng.random() < 0.4:
        name = f"{case.side} {name}" if rng.random() < 0.5 else f"{name} of the {case.side} breast"
    return _maybe(rng, 0.08, _choose(rng, ("preoperative ", "follow-up ", "initial ", "repeat "))) + name


def _patient(case: Case, rng: np.random.Generator) -> str:
    """ "a 54-year-old man with cough", or less."""
    age = case.age
    if age < 16:
        noun = _choose(rng, ("child", "boy" if case.sex == "male" else "girl", "infant" if age < 3 else "patient"))
    else:
        noun = _choose(rng, ("man", "male", "gentleman") if case.sex == "male" else ("woman", "female", "lady"), 0.8)
    if rng.random() < 0.25:
        noun = "patient"
    an = "an" if age in (8, 11, 18) or 80 <= age < 90 else "a"
    aged = f"{an} {age}-year-old {noun}" if rng.random() < 0.8 else f"a {noun} aged {age}"
    aged = aged if rng.random() < 0.85 else f"a {noun}"
    symptoms = _SYMPTOM["chest" if case.modality.startswith("chest") else case.modality]
    return aged + _maybe(rng, 0.7, " with " + _choose(rng, symptoms, 0.6))


def _join(parts: list[str], rng: np.random.Generator) -> str:
    """Sentences from parts: a capital in front, a full stop (usually) behind."""
    glue = ": " if len(parts) > 1 and rng.random() < 0.12 else ". "
    text = (
        glue.join([parts[0], ". ".join(part[0].upper() + part[1:] for part in parts[1:])]) if parts[1:] else parts[0]
    )
    text = text[0].upper() + text[1:]
    return text if rng.random() < 0.25 else text + "."


def _choose(rng: np.random.Generator, options: tuple[str, ...], exponent: float = 1.0) -> str:
    return options[zipf_index(rng, len(options), exponent)]


def _maybe(rng: np.random.Generator, chance: float, words: str) -> str:
    return words if rng.random() < chance else ""
