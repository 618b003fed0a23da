"""What varies in a study, and why: methods, mixtures and spaces as plain values, loaded without ray."""
