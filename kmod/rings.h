/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_RINGS_H
#define SNIFFER_RINGS_H

void sniffer_rings_forget(void);
void sniffer_rings_registered(unsigned int opcode, long ret);

#endif /* SNIFFER_RINGS_H */
