/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_SEED_H
#define SNIFFER_SEED_H

void sniffer_seed(void);
void sniffer_seed_calls(void);

#endif /* SNIFFER_SEED_H */
