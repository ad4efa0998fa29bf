"""The stages of the methods: records in, records out."""
