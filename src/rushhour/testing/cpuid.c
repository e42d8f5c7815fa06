/* An auditor of the dynamic linker that hides instruction sets from every library of a process.
 *
 * Each `cpuid` instruction that RUSHHOUR_CPUID_SITES names (lines "file offset", the offset as the file's own virtual
 * address in hexadecimal) becomes a breakpoint before the library's constructors run. The trap is answered with what
 * the processor says, less AVX-512, VNNI, AVX-VNNI, bfloat16 and AMX. How it is used: processor.py beside this file.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <link.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define LEAF7_EBX_AVX512 \
    (1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31) /* F DQ IFMA PF ER CD BW VL */
#define LEAF7_ECX_AVX512 (1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14) /* VBMI VBMI2 VNNI BITALG VPOPCNTDQ */
#define LEAF7_EDX_HIDDEN \
    (1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25) /* 4VNNIW 4FMAPS VP2INTERSECT AMX-BF16 AVX512-FP16 AMX-TILE AMX-INT8 */
#define LEAF7_1_EAX_HIDDEN (1u << 4 | 1u << 5 | 1u << 21 | 1u << 23) /* AVX-VNNI AVX512-BF16 AMX-FP16 AVX-IFMA */
#define LEAF7_1_EDX_HIDDEN (1u << 4 | 1u << 5 | 1u << 8 | 1u << 10 | 1u << 19) /* AVX-VNNI-INT8 AVX-NE-CONVERT AMX-COMPLEX AVX-VNNI-INT16 AVX10 */

static void answer(int signal, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX], a, b, c, d;
    (void)signal, (void)info;
    __cpuid_count(leaf, subleaf, a, b, c, d);
    if (leaf == 7 && subleaf == 0) {
        b &= ~LEAF7_EBX_AVX512;
        c &= ~LEAF7_ECX_AVX512;
        d &= ~LEAF7_EDX_HIDDEN;
    } else if (leaf == 7 && subleaf == 1) {
        a &= ~LEAF7_1_EAX_HIDDEN;
        d &= ~LEAF7_1_EDX_HIDDEN;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    /* the breakpoint is one byte, and the kernel has stepped over it: the second is a `nop` */
}

static void patch(const char *name, uintptr_t base) {
    const char *sites = getenv("RUSHHOUR_CPUID_SITES");
    FILE *list = sites ? fopen(sites, "r") : NULL;
    char line[4352];
    size_t length = strlen(name);
    long page = sysconf(_SC_PAGESIZE);
    if (list == NULL)
        return;
    while (fgets(line, sizeof line, list)) {
        if (strncmp(line, name, length) != 0 || line[length] != ' ')
            continue;
        unsigned char *at = (unsigned char *)(base + strtoull(line + length + 1, NULL, 16));
        void *start = (void *)((uintptr_t)at & ~(uintptr_t)(page - 1));
        size_t size = (size_t)((char *)at + 2 - (char *)start);
        if (mprotect(start, size, PROT_READ | PROT_WRITE | PROT_EXEC) != 0)
            continue;
        if (at[0] == 0x0f && at[1] == 0xa2) {
            at[1] = 0x90;
            at[0] = 0xcc;
        }
        mprotect(start, size, PROT_READ | PROT_EXEC);
    }
    fclose(list);
}

unsigned int la_version(unsigned int version) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER; /* on the stack as it is: an alternative one may be too small for the registers */
    sigaction(SIGTRAP, &action, NULL);
    return version < LAV_CURRENT ? version : LAV_CURRENT;
}

unsigned int la_objopen(struct link_map *map, Lmid_t namespace, uintptr_t *cookie) {
    (void)cookie;
    if (namespace == LM_ID_BASE && map->l_name != NULL && map->l_name[0] != '\0') {
        char *real = realpath(map->l_name, NULL);
        if (real != NULL) {
            patch(real, map->l_addr);
            free(real);
        }
    }
    return 0;
}
