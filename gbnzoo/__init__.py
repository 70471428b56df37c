"""Ghost-BatchNorm models for timm. Importing this package registers every architecture with timm."""
