/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <link.h>
#include <malloc.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shared_proto.h"
#include "host.h"

void host_one_heap(void)
{
#ifdef M_ARENA_MAX
	mallopt(M_ARENA_MAX, 1);
#endif
}

void host_keep_heap(uint32_t bytes)
{
#if defined(M_MMAP_THRESHOLD) && defined(M_TRIM_THRESHOLD)
	mallopt(M_MMAP_THRESHOLD, (int)bytes);
	mallopt(M_TRIM_THRESHOLD, (int)bytes);
#endif
}

/*
 * Code and constants are read from the page cache again when they are used. Most are
 * used at start only.
 */
static int forget_unwritten(struct dl_phdr_info *object, size_t size, void *page)
{
	(void)size;
	if (!strncmp(object->dlpi_name, "linux-", 6))	/* vdso: from no file */
		return 0;
	for (uint16_t i = 0; i < object->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &object->dlpi_phdr[i];
		uintptr_t mask = ~(*(const uintptr_t *)page - 1);
		uintptr_t begin, end;

		if (part->p_type != PT_LOAD || part->p_flags & PF_W)
			continue;
		begin = (object->dlpi_addr + part->p_vaddr) & mask;
		end = (object->dlpi_addr + part->p_vaddr + part->p_memsz + ~mask) & mask;
		madvise((void *)begin, end - begin, MADV_DONTNEED);
	}
	return 0;
}

void host_trim(void)
{
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);

#ifdef __GLIBC__
	malloc_trim(0);
#endif
	dl_iterate_phdr(forget_unwritten, &page);
}
