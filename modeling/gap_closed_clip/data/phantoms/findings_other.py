"""The findings of the brain, abdomen and breast phantoms, from common to rare, and the words for them."""

from .cases import Finding, Modality


_LOBES = ("frontal", "parietal", "deep", "occipital")
_POLES = ("lower pole", "interpolar", "upper pole")
_LIVER = ("dome", "hilum", "inferior")
_BREAST = ("outer", "inner", "central")

BRAIN = Modality(
    "brain MR",
    (
        "axial T2",
        "axial FLAIR",
        "axial T1 contrast",
        "axial DWI",
        "coronal T1 contrast",
        "sagittal T1",
        "axial T1",
        "coronal T2",
    ),
    (
        Finding(
            "glioma",
            "tumour",
            (
                "a ring-enhancing mass",
                "a glioblastoma",
                "a heterogeneous mass",
                "a high-grade glioma",
                "an infiltrative tumour",
            ),
            "rl",
            _LOBES,
            (18, 75),
            (
                "Surrounding oedema is seen",
                "IDH wild type",
                "Midline shift",
                "Central necrosis",
                "Biopsy was performed",
            ),
        ),
        Finding(
            "infarct",
            "vascular and white matter",
            ("an acute infarct", "restricted diffusion", "an ischaemic stroke", "an infarction", "cytotoxic oedema"),
            "rl",
            ("parietal", "occipital", "frontal", "deep"),
            details=("The ADC is low", "Onset 6 hours before", "The middle cerebral artery was occluded", "NIHSS 14"),
        ),
        Finding("normal", "normal", ("no abnormality", "a normal brain", "no focal lesion", "unremarkable findings")),
        Finding(
            "white matter lesions",
            "vascular and white matter",
            (
                "white matter lesions",
                "periventricular hyperintensities",
                "demyelinating plaques",
                "leukoaraiosis",
            ),
            "b",
            details=(
                "Dawson fingers",
                "Multiple sclerosis",
                "Oligoclonal bands",
                "Small vessel disease",
                "CADASIL was considered",
            ),
        ),
        Finding(
            "meningioma",
            "tumour",
            ("a meningioma", "an extra-axial mass", "a dural-based mass", "a homogeneously enhancing lesion"),
            "rl",
            ("parietal", "frontal", "occipital"),
            (12, 65),
            ("A dural tail is present", "Simpson grade I resection", "CSF cleft sign"),
        ),
        Finding(
            "metastases",
            "tumour",
            (
                "multiple brain metastases",
                "multiple enhancing lesions",
                "cerebral metastases",
                "ring-enhancing nodules",
            ),
            "b",
            details=("The primary was in the lung", "Melanoma", "Toxoplasmosis was excluded", "Neurocysticercosis"),
        ),
        Finding(
            "hydrocephalus",
            "ventricles and volume",
            ("hydrocephalus", "ventriculomegaly", "dilated lateral ventricles", "enlarged ventricles"),
            details=(
                "Transependymal flow",
                "Aqueductal stenosis",
                "A shunt was placed",
                "Normal pressure hydrocephalus",
            ),
        ),
        Finding(
            "subdural",
            "vascular and white matter",
            ("a subdural haematoma", "a crescentic extra-axial collection", "a subdural hygroma", "a chronic SDH"),
            "rlb",
            details=("After a fall", "Burr holes were drilled", "The midline is displaced", "On warfarin"),
        ),
        Finding(
            "atrophy",
            "ventricles and volume",
            ("cerebral atrophy", "widened sulci", "volume loss", "cortical atrophy"),
            details=("Alzheimer disease was suspected", "MMSE 15/30", "Huntington disease"),
        ),
        Finding(
            "haematoma",
            "vascular and white matter",
            ("an intracerebral haematoma", "a haemorrhage", "an intraparenchymal bleed", "a cavernoma"),
            "rl",
            ("deep", "parietal", "frontal"),
            (10, 60),
            ("Hypertension was known", "A haemosiderin rim", "Amyloid angiopathy"),
        ),
        Finding(
            "abscess",
            "tumour",
            ("a brain abscess", "a smooth ring-enhancing lesion", "a cystic lesion with a thin wall"),
            "rl",
            _LOBES,
            (12, 45),
            ("Nocardia grew", "The centre restricts", "It followed otitis", "Streptococcus anginosus"),
        ),
        Finding(
            "old infarct",
            "vascular and white matter",
            ("encephalomalacia", "a chronic infarct", "gliosis", "a porencephalic cyst"),
            "rl",
            ("parietal", "occipital", "frontal"),
            details=("Ex vacuo dilatation", "Years after the stroke", "Epilepsy since childhood"),
        ),
        Finding(
            "arachnoid cyst",
            "ventricles and volume",
            ("an arachnoid cyst", "a CSF-intensity cyst", "an extra-axial cyst"),
            "lr",
            millimetres=(25, 80),
            details=("Galassi type II", "An incidental finding", "It follows CSF on all sequences"),
        ),
    ),
)

ULTRASOUND = Modality(
    "ultrasound",
    ("gray scale", "gray scale oblique"),
    (
        Finding(
            "gallstones",
            "gallbladder",
            ("gallstones", "cholelithiasis", "an echogenic stone", "calculi in the gallbladder", "acoustic shadowing"),
            millimetres=(4, 28),
            details=("Murphy sign was positive", "The wall is not thickened", "The common duct measures 5 mm"),
        ),
        Finding(
            "renal cyst",
            "kidney",
            ("a simple renal cyst", "an anechoic cyst", "a cortical cyst", "a Bosniak I cyst"),
            "rl",
            _POLES,
            (10, 80),
            ("Posterior enhancement", "Polycystic disease was excluded", "No septa"),
        ),
        Finding(
            "liver cyst",
            "liver",
            ("a hepatic cyst", "an anechoic liver lesion", "a hydatid cyst", "a liver abscess"),
            zones=_LIVER,
            millimetres=(12, 95),
            details=("Echinococcus serology was positive", "Amoebic abscess", "Thin walls"),
        ),
        Finding(
            "hydronephrosis",
            "kidney",
            ("hydronephrosis", "a dilated renal pelvis", "pelvicalyceal dilatation", "an obstructed kidney"),
            "rlb",
            details=("The ureter was dilated", "Pelviureteric junction obstruction", "A stent was inserted"),
        ),
        Finding(
            "liver mass",
            "liver",
            ("a hyperechoic lesion", "a haemangioma", "a hepatic mass", "a hepatocellular carcinoma"),
            zones=_LIVER,
            millimetres=(10, 90),
            details=("AFP 800 ng/ml", "No flow on Doppler", "Focal nodular hyperplasia", "Hepatitis B carrier"),
        ),
        Finding("normal kidney", "kidney", ("a normal kidney", "no hydronephrosis", "normal renal echotexture"), "rl"),
        Finding(
            "renal stone",
            "kidney",
            ("a renal calculus", "nephrolithiasis", "an echogenic focus with shadowing", "a staghorn calculus"),
            "rl",
            _POLES,
            (4, 30),
            ("Twinkling artefact", "Lithotripsy was planned", "Hyperparathyroidism"),
        ),
        Finding(
            "cholecystitis",
            "gallbladder",
            ("acute cholecystitis", "a thickened gallbladder wall", "wall oedema", "gallbladder wall thickening"),
            millimetres=(4, 12),
            details=("Pericholecystic fluid", "Cholecystectomy was done", "Dengue fever"),
        ),
        Finding(
            "metastases",
            "liver",
            ("multiple liver metastases", "target lesions", "multiple hypoechoic nodules", "hepatic metastases"),
            details=("Colorectal primary", "Neuroendocrine tumour", "Candidiasis was excluded"),
        ),
        Finding(
            "normal gallbladder", "gallbladder", ("a normal gallbladder", "no gallstones", "a thin-walled gallbladder")
        ),
        Finding(
            "ascites",
            "liver",
            ("ascites", "free fluid", "perihepatic fluid", "cirrhosis with ascites"),
            details=("The liver is shrunken", "Paracentesis of 5 litres", "Budd-Chiari syndrome"),
        ),
        Finding(
            "steatosis",
            "liver",
            ("a fatty liver", "hepatic steatosis", "a bright liver", "increased liver echogenicity"),
            details=("ALT was raised", "NAFLD", "The diaphragm is poorly seen"),
        ),
        Finding(
            "polyp",
            "gallbladder",
            ("a gallbladder polyp", "a non-shadowing polypoid lesion", "an adenomyoma", "gallbladder carcinoma"),
            millimetres=(3, 25),
            details=("It did not move", "Cholesterolosis", "Yearly follow-up"),
        ),
    ),
)

MAMMOGRAM = Modality(
    "mammogram",
    ("CC", "MLO"),
    (
        Finding(
            "spiculated mass",
            "mass",
            ("a spiculated mass", "an irregular mass", "an invasive ductal carcinoma", "a dense mass with spicules"),
            "rl",
            _BREAST,
            (7, 50),
            ("BI-RADS 5", "HER2 positive", "Axillary nodes were involved", "Skin retraction", "Palpable lump"),
        ),
        Finding(
            "calcifications",
            "calcifications",
            ("clustered microcalcifications", "pleomorphic calcifications", "a cluster of calcifications", "DCIS"),
            "rl",
            _BREAST,
            (4, 40),
            ("BI-RADS 4", "Stereotactic biopsy followed", "Comedo type", "Linear branching"),
        ),
        Finding(
            "normal",
            "no suspicious finding",
            ("no abnormality", "a normal breast", "no suspicious finding", "BI-RADS 1"),
            "rl",
        ),
        Finding(
            "circumscribed mass",
            "mass",
            (
                "a circumscribed mass",
                "a fibroadenoma",
                "a well-defined round mass",
                "an oval mass",
                "a phyllodes tumour",
            ),
            "rl",
            _BREAST,
            (8, 60),
            ("Ultrasound showed a cyst", "BI-RADS 2", "Stable since 2009", "Core biopsy was benign"),
        ),
        Finding(
            "dense",
            "no suspicious finding",
            ("dense breast tissue", "extremely dense parenchyma", "a dense breast", "ACR category D"),
            "rl",
            details=("Sensitivity is reduced", "Tomosynthesis was added", "Hormone therapy"),
        ),
        Finding(
            "coarse calcification",
            "calcifications",
            ("a popcorn calcification", "a coarse calcification", "a calcified fibroadenoma", "fat necrosis"),
            "rl",
            _BREAST,
            (5, 30),
            ("Benign", "After reduction surgery", "Oil cyst"),
        ),
        Finding(
            "skin thickening",
            "mass",
            ("skin thickening", "diffusely increased density", "inflammatory carcinoma", "trabecular thickening"),
            "rl",
            details=("Peau d'orange", "Mastitis was treated", "After radiotherapy"),
        ),
        Finding(
            "implant", "no suspicious finding", ("a breast implant", "a silicone implant", "a ruptured implant"), "rl"
        ),
    ),
)
