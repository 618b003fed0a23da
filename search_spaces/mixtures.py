"""Named mixtures of the pocket domains: domain -> weight, where weight 1 is `data.samples` samples."""

MIXTURES: dict[str, dict[str, float]] = {
    "general_only": {"general": 1.0},
    "document_only": {"document": 1.0},
    "biomedical_only": {"biomedical": 1.0},
    "general_document": {"general": 1.0, "document": 1.0},
    "general_biomedical": {"general": 1.0, "biomedical": 1.0},
    "document_biomedical": {"document": 1.0, "biomedical": 1.0},
    "all_equal": {"general": 1.0, "document": 1.0, "biomedical": 1.0},
    "all_doubled": {"general": 2.0, "document": 2.0, "biomedical": 2.0},
    "general_doubled": {"general": 2.0, "document": 1.0, "biomedical": 1.0},
    "document_doubled": {"general": 1.0, "document": 2.0, "biomedical": 1.0},
    "biomedical_doubled": {"general": 1.0, "document": 1.0, "biomedical": 2.0},
}
